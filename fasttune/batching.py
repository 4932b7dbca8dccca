"""Samples to batches: buckets of like cost, in an order that the seed and the position alone decide."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttune.data import Encoded
from fasttune.errors import DataError
from fasttune.task import Sample

Pack = Callable[[list[Sample]], list[Sample]]
Sides = Sequence[tuple[int, int]] | None  # `Sample.sides`
Draw = Sequence[int] | None  # as `Encoded.sample` takes it
Key = tuple[list[int], Draw]  # of a micro-batch: its samples, and how they are drawn

_FEWEST = 4  # samples that a micro-batch is cut down to at most, to save padding
_MOST_PADDING = 0.1
_POOL = 50  # batches that are sorted together: costs within a batch are alike, batches still differ by chance


@dataclass
class MicroBatch:
    """What one forward pass sees.

    tensors: [samples, ...], padded to the longest. samples: indices into the encoded samples.
    cost: the sum of the samples' costs; padded_cost: with the padding.
    """

    tensors: dict[str, Tensor]
    samples: list[int]
    cost: int
    padded_cost: int


@dataclass(frozen=True)
class Position:
    """Where the next batch stands: JSON-able, so that a resumed run goes on with the same batch."""

    epoch: int = 0
    batch: int = 0


def plan_epoch(costs: Sequence[int], batch: int, seed: int, epoch: int, sides: Sides = None) -> list[list[int]]:
    """Every sample once, in batches of at most `batch`: shuffled, sorted by shape and by cost within pools of 50
    batches, so that little is padding, and the batches shuffled again. Of one shape, the longest sample of a batch
    stands first."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(costs))
    cost = np.asarray(costs)
    shape = np.zeros(len(costs)) if sides is None else np.round(2 * np.log2([high / wide for high, wide in sides]))
    batches: list[list[int]] = []
    for start in range(0, len(order), _POOL * batch):
        pool = order[start : start + _POOL * batch]
        pool = pool[np.lexsort((-cost[pool], shape[pool]))]
        batches += [pool[i : i + batch].tolist() for i in range(0, len(pool), batch)]
    return [batches[i] for i in random.permutation(len(batches))]


def padded(samples: Sequence[int], costs: Sequence[int], sides: Sides = None) -> int:
    """What a batch of these samples costs with its padding."""
    if sides is None:
        return max(costs[i] for i in samples) * len(samples)
    return math.prod(map(max, zip(*(sides[i] for i in samples), strict=True))) * len(samples)


def plan_in_order_of_cost(costs: Sequence[int], batch: int) -> list[list[int]]:
    """For evaluation: the costliest first, so that what doesn't fit in memory fails at once."""
    order = np.argsort(-np.asarray(costs), kind="stable")
    return [order[i : i + batch].tolist() for i in range(0, len(order), batch)]


def collate(samples: Sequence[Sample], padding: Mapping[str, float]) -> dict[str, Tensor]:
    """Stacks samples, each tensor padded at its end, in every dimension, to the largest. int32 becomes int64."""
    tensors = {}
    for name in samples[0].tensors:
        arrays = [np.asarray(sample.tensors[name]) for sample in samples]
        shape = tuple(np.max([array.shape for array in arrays], axis=0)) if arrays[0].ndim else ()
        dtype = np.dtype(np.int64) if arrays[0].dtype == np.int32 else arrays[0].dtype
        stacked = np.full((len(arrays), *shape), padding.get(name, 0), dtype=dtype)
        for row, array in zip(stacked, arrays, strict=True) if shape else ():
            row[tuple(slice(size) for size in array.shape)] = array
        tensors[name] = torch.from_numpy(stacked if shape else np.asarray(arrays, dtype=dtype))
    return tensors


class Loader:
    """Micro-batches of encoded samples, along a plan; decoded in `workers` processes if there are any.

    pack: puts the samples of a micro-batch together (`Task.pack`), or None.
    """

    def __init__(self, encoded: Encoded, padding: Mapping[str, float], workers: int = 0, pack: Pack | None = None):
        self.encoded, self.padding, self.workers, self.pack = encoded, padding, workers, pack

    def load(self, samples: list[int], draw: Draw = None) -> MicroBatch:
        """draw: as `Encoded.sample` takes it."""
        cost = sum(self.encoded.costs[i] for i in samples)
        found = [self.encoded.sample(i, draw) for i in samples]
        if self.pack:
            found = self.pack(found)
        sides = [sample.sides for sample in found if sample.sides is not None]
        whole = padded(range(len(found)), [sample.cost for sample in found], sides or None)
        return MicroBatch(collate(found, self.padding), samples, cost, whole)

    def along(self, plan: Iterable[list[int]], draw: Draw = None) -> Iterator[MicroBatch]:
        """A micro-batch an item of the plan."""
        return self.stream((samples, draw) for samples in plan)

    def stream(self, keys: Iterable[Key]) -> Iterator[MicroBatch]:
        """A micro-batch a key; keys may be endless, and are read ahead."""
        if self.workers == 0 or self.encoded.keep:
            yield from (self.load(*key) for key in keys)
            return
        # Forked, since a model and memory-mapped rows are shared that way instead of pickled; once for all epochs,
        # since pages that are written after a fork are copied.
        for found in torch.utils.data.DataLoader(
            _Loaded(self),
            sampler=keys,
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context="fork",
            worker_init_fn=_yield_to_training,
        ):
            if isinstance(found, DataError):
                raise found
            yield found


def _yield_to_training(_: int) -> None:
    """A worker that takes a core from one of the threads that multiply holds up all of them: on two cores a step
    of a detector took 6 % longer where both had the same priority."""
    os.nice(19)


class _Loaded(torch.utils.data.Dataset):
    """A loader as a dataset whose items are whole micro-batches."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __getitem__(self, key: Key) -> MicroBatch | DataError:
        try:
            return self.loader.load(*key)
        except DataError as error:  # raised here, torch would make a RuntimeError of it
            return error


class Batches:
    """The batches of a run, from any position on: the micro-batches of each optimizer step."""

    def __init__(self, loader: Loader, batch: int, accumulation: int, seed: int):
        self.loader, self.batch, self.accumulation, self.seed = loader, batch, accumulation, seed
        self.per_epoch = math.ceil(len(loader.encoded) / batch)

    def plan(self, epoch: int) -> list[list[int]]:
        encoded = self.loader.encoded
        return plan_epoch(encoded.costs, self.batch, self.seed, epoch, encoded.sides)

    def starting(self, position: Position) -> Iterator[tuple[list[MicroBatch], Position]]:
        """Micro-batches of a step, and the position of the next step; endless, one epoch after another."""
        keys = ((piece, (self.seed, at.epoch)) for pieces, at in self._steps(position) for piece in pieces)
        loaded = self.loader.stream(keys)
        for pieces, at in self._steps(position):
            following = replace(at, batch=at.batch + 1)
            yield (
                [next(loaded) for _ in pieces],
                following if following.batch < self.per_epoch else Position(at.epoch + 1),
            )

    def _steps(self, position: Position) -> Iterator[tuple[list[list[int]], Position]]:
        """The samples of each micro-batch of a step, and where the step stands; endless."""
        costs, sides = self.loader.encoded.costs, self.loader.encoded.sides
        start = position.batch
        for epoch in count(position.epoch):
            for index, batch in enumerate(self.plan(epoch)[start:], start):
                pieces = cut(batch, self.accumulation)
                if not self.loader.pack:
                    pieces = [tight for piece in pieces for tight in tighten(piece, costs, sides)]
                yield pieces, Position(epoch, index)
            start = 0


def cut(batch: list[int], pieces: int) -> list[list[int]]:
    """A batch in `pieces` micro-batches whose sizes differ by one at most; none is empty."""
    size, larger = divmod(len(batch), pieces)
    ends = [i * size + min(i, larger) for i in range(1, pieces + 1)]
    return [batch[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def tighten(batch: list[int], costs: Sequence[int], sides: Sides = None) -> list[list[int]]:
    """A micro-batch, as `plan_epoch` sorts it, cut in two where that saves most, as long as more than a tenth of
    it is padding. Sums and counts keep the gradient the same; only a few uneven batches pay for a second pass."""
    size = len(batch)
    if size < 2 * _FEWEST or sum(costs[i] for i in batch) >= (1 - _MOST_PADDING) * padded(batch, costs, sides):
        return [batch]
    places = range(_FEWEST, size - _FEWEST + 1)
    place = min(places, key=lambda k: padded(batch[:k], costs, sides) + padded(batch[k:], costs, sides))
    return tighten(batch[:place], costs, sides) + tighten(batch[place:], costs, sides)


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
