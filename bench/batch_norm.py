"""Batch norm of images in channels_last, in training, forward and backward, against PyTorch's own.

The floor: x copied four times, since a batch norm reads x four times and dy twice, and writes y and dx.
"contiguous": PyTorch's own on images that lie channel by channel.

pytest bench/batch_norm.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from measure import DTYPES, Table, peak_memory, sized

from fasttune import contests

SIZES = {  # images, channels, height, width
    "cpu": [
        (8, 12, 256, 256),
        (8, 24, 128, 128),
        (8, 64, 64, 64),
        (8, 128, 64, 64),
        (8, 256, 32, 32),
        (8, 512, 8, 8),
        (8, 8, 64, 64),
    ],
    "cuda": [(64, 256, 56, 56)],
}
TABLE = Table("GB/s", floor="four copies", base="torch")
IMPLEMENTATIONS = {
    "fasttune": contests.OURS["batch_norm"],
    "torch": contests.torch_batch_norm,
    "torch compiled": torch.compile(contests.torch_batch_norm),
    "torch, contiguous": contests.torch_batch_norm,
}


def prepare(name: str, device: str, dtype: str, size: tuple[int, ...], strided: bool) -> Callable[[], object]:
    """One step: the result and the gradients of x, weight and bias. "four copies": the floor."""
    contest = contests.batch_norm(tuple(size), getattr(torch, dtype), device, strided)
    x, *parameters = contest.arguments
    if name == "four copies":
        other = torch.empty_like(x)
        return lambda: [other.copy_(x.detach()) for _ in range(4)]
    if name.endswith("contiguous"):
        planar = x.detach().contiguous().requires_grad_()
        arguments = (planar, *parameters)
        upstream = contest.upstream.contiguous()
        contest = replace(contest, arguments=arguments, wanted=arguments, upstream=upstream)
    return contest.checked(IMPLEMENTATIONS[name])


def case(device: str, dtype: str, size: tuple[int, ...], strided: bool) -> str:
    gradient = "strided gradient" if strided else "dense gradient"
    return f"batch_norm, {' x '.join(map(str, size))}, {dtype}, {gradient}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_time(benchmark, strided, dtype, device, size):
    calls = {name: prepare(name, device, dtype, size, strided) for name in ("four copies", *IMPLEMENTATIONS)}
    moved = 8 * torch.Size(size).numel() * getattr(torch, dtype).itemsize
    TABLE.race(benchmark, case(device, dtype, size, strided), calls, work=moved)


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, dtype, device, size):
    peak = peak_memory(__file__, "prepare", name, device, dtype, size, False, device=device)
    gradients = torch.Size(size).numel() * getattr(torch, dtype).itemsize
    TABLE.add(case(device, dtype, size, False), name, peak=peak, gradients=gradients)
