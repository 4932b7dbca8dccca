"""Attention with a mask, forward and backward, with and without dropout on its weights, against PyTorch's forms.

The floor: the six products of forward and backward, with nothing between them. What computes scores again in the
backward does a seventh.

pytest bench/attention.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import DTYPES, Table, peak_memory, sized

from fasttune import contests

SIZES = {  # batch, heads, length, width
    "cpu": [(32, 12, 96, 32), (32, 12, 98, 32), (32, 12, 96, 64), (8, 12, 256, 64), (2, 12, 1024, 64)],
    "cuda": [(8, 32, 2048, 64)],
}
TABLE = Table("GFLOP/s", floor="products", base="sdpa")


def with_our_dropout(q, k, v, mask, p):
    return contests.plain_attention(q, k, v, mask, p, contests.OURS["dropout"])


IMPLEMENTATIONS = {
    "fasttune": contests.OURS["attention"],
    "plain, fasttune's dropout": with_our_dropout,
    "plain": contests.plain_attention,
    "plain compiled": torch.compile(contests.plain_attention),
    "sdpa": contests.torch_attention,
}


def prepare(name: str, device: str, dtype: str, size: tuple[int, ...], p: float) -> Callable[[], object]:
    """One step: the result and the gradients of query, key and value. "products": the floor."""
    contest = contests.attention(tuple(size), getattr(torch, dtype), device, p)
    if name != "products":
        return contest.checked(IMPLEMENTATIONS[name])
    q, k, v, _ = (t.detach() for t in contest.arguments)
    upstream = contest.upstream.transpose(1, 2)

    def step() -> tuple[torch.Tensor, ...]:
        scores = q @ k.transpose(2, 3)
        weights = upstream @ v.transpose(2, 3)
        return scores @ v, weights @ k, weights.transpose(2, 3) @ q, scores.transpose(2, 3) @ upstream

    return step


def case(device: str, dtype: str, size: tuple[int, ...], p: float) -> str:
    return f"attention, {' x '.join(map(str, size))}, {dtype}, dropout {p}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, contests.DROPOUT])
def test_time(benchmark, p, dtype, device, size):
    calls = {name: prepare(name, device, dtype, size, p) for name in ("products", *IMPLEMENTATIONS)}
    batch, heads, length, width = size
    TABLE.race(benchmark, case(device, dtype, size, p), calls, work=12 * batch * heads * length**2 * width)


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, contests.DROPOUT])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, p, dtype, device, size):
    batch, heads, length, width = size
    peak = peak_memory(__file__, "prepare", name, device, dtype, size, p, device=device)
    gradients = 3 * batch * heads * length * width * getattr(torch, dtype).itemsize
    TABLE.add(case(device, dtype, size, p), name, peak=peak, gradients=gradients)
