"""Deformable attention, forward and backward, against transformers' form by grid_sample.

The floor: value, locations, weights and the result's gradient copied, the least that is read and written but for
one more reading in the backward. With bfloat16, locations and weights are float32, as autocast leaves them.

pytest bench/deformable_attention.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import DTYPES, Table, peak_memory, sized

from fasttune import contests

SIZES = {  # batch, heads, width of a head, queries, side of the first of three maps, points a map
    "cpu": [(8, 4, 32, 196, 64, 4), (8, 4, 32, 5376, 64, 4), (2, 8, 32, 300, 80, 4), (8, 8, 16, 300, 64, 4)],
    "cuda": [(16, 8, 32, 300, 80, 4), (16, 8, 32, 8400, 80, 4)],
}
TABLE = Table("GB/s", floor="copies", base="torch")
IMPLEMENTATIONS = {
    "fasttune": contests.OURS["deformable_attention"],
    "torch": contests.torch_deformable_attention,
}


def prepare(name: str, device: str, dtype: str, size: tuple[int, ...]) -> Callable[[], object]:
    """One step: the result and the gradients of value, locations and weights. "copies": the floor."""
    contest = contests.deformable_attention(tuple(size), getattr(torch, dtype), device)
    if name != "copies":
        return contest.checked(IMPLEMENTATIONS[name])
    tensors = [contest.upstream, *(tensor.detach() for tensor in contest.wanted)]
    others = [torch.empty_like(tensor) for tensor in tensors]
    return lambda: [other.copy_(tensor) for other, tensor in zip(others, tensors, strict=True)]


def bytes_of(dtype: str, size: tuple[int, ...]) -> tuple[int, int]:
    """Of the gradients, and of the result."""
    batch, heads, width, queries, side, points = size
    pixels = sum((side >> level) ** 2 for level in range(3))
    item = getattr(torch, dtype).itemsize
    gradients = batch * heads * (pixels * width * item + queries * 3 * points * 3 * 4)
    return gradients, batch * heads * queries * width * item


def case(device: str, dtype: str, size: tuple[int, ...]) -> str:
    return f"deformable attention, {' x '.join(map(str, size))}, {dtype}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_time(benchmark, dtype, device, size):
    calls = {name: prepare(name, device, dtype, size) for name in ("copies", *IMPLEMENTATIONS)}
    TABLE.race(benchmark, case(device, dtype, size), calls, work=2 * sum(bytes_of(dtype, size)))


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, dtype, device, size):
    peak = peak_memory(__file__, "prepare", name, device, dtype, size, device=device)
    TABLE.add(case(device, dtype, size), name, peak=peak, gradients=bytes_of(dtype, size)[0])
