"""Decode and meter over a split; predictions in the order of their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fasttune.batching import Loader, MicroBatch, plan_in_order_of_cost, to_device
from fasttune.data import Encoded
from fasttune.task import Bundle, Task

Before = Callable[[MicroBatch], None]


def _batches(
    loader: Loader, batch: int, bundle: Bundle, before: Before | None, samples: list[int] | None = None
) -> Iterator[tuple[MicroBatch, dict]]:
    device = next(bundle.model.parameters()).device
    bundle.model.eval()
    chosen = np.arange(len(loader.encoded)) if samples is None else np.asarray(samples)
    costs = np.asarray(loader.encoded.costs)[chosen].tolist()
    plan = [chosen[batch].tolist() for batch in plan_in_order_of_cost(costs, batch)]
    for micro in loader.along(plan):
        if before:
            before(micro)
        yield micro, to_device(micro.tensors, device)


@torch.no_grad()
def evaluate(
    task: Task,
    bundle: Bundle,
    loader: Loader,
    batch: int,
    *,
    before: Before | None = None,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Metrics of the rows: `loss` and its parts, means over all that is supervised, and what the meter says.

    max_rows: look at no more rows than these, spread evenly. The model is left in eval mode.
    """
    meter, joined = task.meter(), _Joined(task, loader.encoded)
    total, count = 0.0, 0.0
    parts: dict[str, float] = {}
    samples = None if max_rows is None else samples_of(loader.encoded, spread(loader.encoded, max_rows))
    for micro, tensors in _batches(loader, batch, bundle, before, samples):
        loss, predictions = task.score(bundle.model, tensors, bundle)
        total, count = total + float(loss.total), count + float(loss.count)
        for name, part in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + float(part)
        if predictions is None:
            continue
        _count_must_match(task, predictions, micro)
        for index, prediction in zip(micro.samples, predictions, strict=True):
            if (row := joined.add(index, prediction)) is not None:
                meter.update(*row)
    means = {name: value / (count or 1.0) for name, value in {"loss": total, **parts}.items()}
    return task.finish({**means, **meter.result()})


@torch.no_grad()
def predict(
    task: Task,
    bundle: Bundle,
    loader: Loader,
    batch: int,
    *,
    before: Before | None = None,
    rows: list[int] | None = None,
) -> list[tuple[int, Any]]:
    """(position of the row, prediction) a row, in order. rows: positions of those that are wanted; None: all.
    The model is left in eval mode."""
    joined = _Joined(task, loader.encoded)
    found: dict[int, Any] = {}
    samples = None if rows is None else samples_of(loader.encoded, rows)
    for micro, tensors in _batches(loader, batch, bundle, before, samples):
        predictions = task.decode(bundle.model, tensors, bundle)
        _count_must_match(task, predictions, micro)
        for index, prediction in zip(micro.samples, predictions, strict=True):
            if (row := joined.add(index, prediction)) is not None:
                found[loader.encoded.owner[index]] = row[0]
    return sorted(found.items())


def spread(encoded: Encoded, most: int) -> list[int]:
    """Positions of at most that many rows, spread evenly over those that are usable."""
    usable = sorted(set(encoded.owner))
    step = max(1.0, len(usable) / most)
    return [usable[int(i * step)] for i in range(min(most, len(usable)))]


def samples_of(encoded: Encoded, rows: list[int]) -> list[int]:
    """The samples of these rows."""
    wanted = set(rows)
    return [index for index, owner in enumerate(encoded.owner) if owner in wanted]


class _Joined:
    """Predictions of samples, in whatever order, joined to those of rows."""

    def __init__(self, task: Task, encoded: Encoded):
        self.task, self.encoded = task, encoded
        self._expected = Counter(encoded.owner)
        self._parts: dict[int, dict[int, Any]] = {}

    def add(self, index: int, prediction: Any) -> tuple[Any, dict[str, Any]] | None:
        """(prediction, reference) of the sample's row, once all of its samples are there."""
        owner = self.encoded.owner[index]
        parts = self._parts.setdefault(owner, {})
        parts[index] = prediction
        if len(parts) < self._expected[owner]:
            return None
        del self._parts[owner]
        row = self.encoded.reference(index)
        return self.task.join([parts[part] for part in sorted(parts)], row), row


def _count_must_match(task: Task, predictions: list[Any], micro: MicroBatch) -> None:
    if len(predictions) != len(micro.samples):
        name = type(task).__name__
        raise ValueError(f"{name}.decode gave {len(predictions)} predictions for {len(micro.samples)} samples")
