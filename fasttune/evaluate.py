"""Decode and meter over a split; predictions in the order of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fasttune.batching import Loader, MicroBatch, plan_in_order_of_cost, to_device
from fasttune.task import Bundle, Task

Before = Callable[[MicroBatch], None]


def _batches(
    loader: Loader, batch: int, bundle: Bundle, before: Before | None
) -> Iterator[tuple[MicroBatch, dict]]:
    device = next(bundle.model.parameters()).device
    bundle.model.eval()
    for micro in loader.along(plan_in_order_of_cost(loader.encoded.costs, batch)):
        if before:
            before(micro)
        yield micro, to_device(micro.tensors, device)


@torch.no_grad()
def evaluate(
    task: Task, bundle: Bundle, loader: Loader, batch: int, *, before: Before | None = None
) -> dict[str, Any]:
    """Metrics of the samples, and `loss`, the mean over all that is supervised. The model is left in eval mode."""
    meter = task.meter()
    total, count = 0.0, 0.0
    for micro, tensors in _batches(loader, batch, bundle, before):
        loss, predictions = task.score(bundle.model, tensors, bundle)
        _count_must_match(task, predictions, micro)
        total, count = total + float(loss.total), count + float(loss.count)
        for prediction, index in zip(predictions, micro.samples, strict=True):
            meter.update(prediction, loader.encoded.reference(index))
    return {"loss": total / count if count else 0.0, **meter.result()}


@torch.no_grad()
def predict(
    task: Task, bundle: Bundle, loader: Loader, batch: int, *, before: Before | None = None
) -> list[tuple[int, Any]]:
    """(position of the row, prediction) a sample, in the order of the rows. The model is left in eval mode."""
    found: dict[int, Any] = {}
    for micro, tensors in _batches(loader, batch, bundle, before):
        predictions = task.decode(bundle.model, tensors, bundle)
        _count_must_match(task, predictions, micro)
        found.update(zip(micro.samples, predictions, strict=True))
    return [(loader.encoded.owner[index], found[index]) for index in sorted(found)]


def _count_must_match(task: Task, predictions: list[Any], micro: MicroBatch) -> None:
    if len(predictions) != len(micro.samples):
        name = type(task).__name__
        raise ValueError(f"{name}.decode gave {len(predictions)} predictions for {len(micro.samples)} samples")
