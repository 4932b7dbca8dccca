"""Samples put together in rows, each kept apart by positions that count anew."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from fasttune.models.language import IGNORED
from fasttune.task import Sample


def plan(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of samples by row, with at most `room` tokens in a row, or one sample that is longer.

    The number of rows is that of first fit, longest first; the samples are then dealt out anew, the longest to the
    emptiest row, so that rows are of like length, if they still fit.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    left: list[int] = []
    for index in order:
        place = next((row for row, free in enumerate(left) if lengths[index] <= free), None)
        if place is None:
            rows.append([])
            left.append(room)
            place = len(rows) - 1
        rows[place].append(index)
        left[place] -= lengths[index]
    return _dealt_out(order, lengths, len(rows), room) or rows


def _dealt_out(order: list[int], lengths: Sequence[int], count: int, room: int) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for index in order:
        filled, row = heapq.heappop(heap)
        if rows[row] and filled + lengths[index] > room:
            return None
        rows[row].append(index)
        heapq.heappush(heap, (filled + lengths[index], row))
    return rows


def pack(samples: Sequence[Sample], room: int) -> list[Sample]:
    """Rows of input_ids, labels and position_ids, int64 [tokens]; what else the samples hold is for predictions.

    A sample's first token is no target: the token before it is of another sample.
    """
    return [_joined([samples[index] for index in row]) for row in plan([sample.cost for sample in samples], room)]


def _joined(samples: list[Sample]) -> Sample:
    labels = []
    for sample in samples:
        own = sample.tensors["labels"].copy()
        own[0] = IGNORED
        labels.append(own)
    tensors = {
        "input_ids": np.concatenate([sample.tensors["input_ids"] for sample in samples]),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([np.arange(sample.cost, dtype=np.int64) for sample in samples]),
    }
    return Sample(tensors, cost=sum(sample.cost for sample in samples))
