"""The loop: a generator of StepRecord. It sees a model, batches and a loss; no task name, path or run file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fasttune.batching import Batches, MicroBatch, Position, to_device
from fasttune.errors import TrainingError
from fasttune.ops import raise_pending
from fasttune.optim import Optimizer
from fasttune.task import Loss

_MOST_SKIPPED = 3  # steps in a row


class LossModule(nn.Module):
    """Model and loss in one module, so that the hooks of DDP, FSDP2 and torch.compile see whatever is called."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, dict[str, Tensor]], Loss]):
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, tensors: dict[str, Tensor]) -> Loss:
        return self._loss(self.model, tensors)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    step: counts from 1. loss: mean over what was supervised. norm: of the gradient, before clipping.
    taken: False if loss or gradient was not finite. cost, padded_cost: units of `Sample.cost`, without and with
    padding. seconds: wall clock of the step. following: where the next batch stands.
    """

    step: int
    loss: float
    lr: float
    norm: float
    taken: bool
    rows: int
    cost: int
    padded_cost: int
    seconds: float
    following: Position


def train(
    module: LossModule,
    batches: Batches,
    optimizer: Optimizer,
    *,
    start: int = 0,
    position: Position = Position(),  # noqa: B008 - frozen
    set_mode: Callable[[], None],
    before: Callable[[MicroBatch], None] | None = None,
) -> Iterator[StepRecord]:
    """Trains from step `start` (steps already taken) to `optimizer.steps`, and yields after each step.

    set_mode: puts the modules into training mode; called at each step, since the body of the caller's loop may
    evaluate. before: called with each micro-batch before its forward pass.
    Raises TrainingError, with the samples' rows, after three steps in a row that are not finite.
    """
    device = next(module.parameters()).device
    source = batches.starting(position)
    skipped = 0
    for step in range(start, optimizer.steps):
        began = time.perf_counter()
        set_mode()
        optimizer.unfreeze(step)
        micro_batches, position = next(source)
        total, count = 0.0, 0.0
        for micro in micro_batches:
            if before:
                before(micro)
            loss = module(to_device(micro.tensors, device))
            loss.total.backward()
            optimizer.collect()
            total, count = total + float(loss.total.detach()), count + float(loss.count)
        raise_pending()
        count = count or float(total != 0.0)  # nothing is counted, and yet there is a loss
        lr = optimizer.lr(step)
        done = optimizer.step(step, count if _finite(total) else 0.0)
        skipped = 0 if done.taken else skipped + 1
        samples = [index for micro in micro_batches for index in micro.samples]
        yield StepRecord(
            step + 1,
            total / count if count else float("nan"),
            lr,
            done.norm,
            done.taken,
            len(samples),
            sum(micro.cost for micro in micro_batches),
            sum(micro.padded_cost for micro in micro_batches),
            time.perf_counter() - began,
            position,
        )
        if skipped >= _MOST_SKIPPED:
            rows = sorted(batches.loader.encoded.rows.number(batches.loader.encoded.owner[i]) for i in samples)
            raise TrainingError(
                f"loss or gradient was not finite in {skipped} steps in a row; the last batch held rows {rows}. "
                "No weights were changed by these steps. A lower train.lr or precision fp32 is the usual cure."
            )


def _finite(value: float) -> bool:
    return value - value == 0.0
