"""Dropout, forward and backward, against `F.dropout`; the floor is the tensor copied twice.

pytest bench/dropout.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import DTYPES, Table, peak_memory, sized

from fasttune import contests

SIZES = {"cpu": [(2880, 384), (2880, 1536)], "cuda": [(16384, 4096)]}  # rows, features
TABLE = Table("GB/s", floor="two copies", base="torch")
IMPLEMENTATIONS = {
    "fasttune": contests.OURS["dropout"],
    "torch": F.dropout,
    "torch compiled": torch.compile(F.dropout),
}


def prepare(name: str, device: str, dtype: str, size: tuple[int, int]) -> Callable[[], object]:
    """One step: the result and the gradient of x. "two copies": the floor."""
    contest = contests.dropout(tuple(size), getattr(torch, dtype), device)
    if name != "two copies":
        return contest.checked(IMPLEMENTATIONS[name])
    x = contest.arguments[0].detach()
    other = torch.empty_like(x)
    return lambda: (other.copy_(x), other.copy_(x))


def case(device: str, dtype: str, size: tuple[int, int]) -> str:
    return f"dropout, {' x '.join(map(str, size))}, {dtype}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_time(benchmark, dtype, device, size):
    calls = {name: prepare(name, device, dtype, size) for name in ("two copies", *IMPLEMENTATIONS)}
    moved = 4 * size[0] * size[1] * getattr(torch, dtype).itemsize
    TABLE.race(benchmark, case(device, dtype, size), calls, work=moved)


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, dtype, device, size):
    peak = peak_memory(__file__, "prepare", name, device, dtype, size, device=device)
    gradients = size[0] * size[1] * getattr(torch, dtype).itemsize
    TABLE.add(case(device, dtype, size), name, peak=peak, gradients=gradients)
