"""Cross-entropy, forward and backward, against `F.cross_entropy`; the floor is a copy, one read and one write.

pytest bench/cross_entropy.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from measure import DTYPES, Table, peak_memory, sized
from torch import Tensor

from fasttune import contests
from fasttune.ops import cross_entropy

SIZES = {"cpu": [(1024, 32000)], "cuda": [(8192, 128256)]}  # rows, classes
TABLE = Table("GB/s", floor="copy", base="torch")


class _Layer(torch.autograd.Function):
    """What hands the logits over: without it they would be a leaf, which nobody may overwrite."""

    @staticmethod
    def forward(ctx, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()


def fasttune_in_place(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, inplace=True)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fasttune": cross_entropy,
    "fasttune in place": fasttune_in_place,
    "torch": F.cross_entropy,
    "torch compiled": torch.compile(F.cross_entropy),
}
if torch.cuda.is_available() and find_spec("liger_kernel"):
    from liger_kernel.transformers.functional import liger_cross_entropy

    IMPLEMENTATIONS["liger (in place)"] = lambda logits, target: liger_cross_entropy(logits, target)


def prepare(name: str, device: str, dtype: str, size: tuple[int, int]) -> Callable[[], object]:
    """One step: the loss and the gradient of the logits. "copy": the floor."""
    contest = contests.cross_entropy(tuple(size), getattr(torch, dtype), device)
    kept, target = (t.detach() for t in contest.arguments)
    if name == "copy":
        other = torch.empty_like(kept)
        return lambda: other.copy_(kept)
    weight, function = torch.ones((), requires_grad=True), IMPLEMENTATIONS[name]

    def step() -> tuple[Tensor, ...]:
        logits = _Layer.apply(weight, kept)
        loss = function(logits, target)
        return loss, *torch.autograd.grad(loss, logits)

    contest.check(lambda p: step)
    return step


def case(device: str, dtype: str, size: tuple[int, int]) -> str:
    return f"cross entropy, {' x '.join(map(str, size))}, {dtype}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_time(benchmark, dtype, device, size):
    calls = {name: prepare(name, device, dtype, size) for name in ("copy", *IMPLEMENTATIONS)}
    moved = 2 * size[0] * size[1] * getattr(torch, dtype).itemsize
    TABLE.race(benchmark, case(device, dtype, size), calls, work=moved)


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, dtype, device, size):
    peak = peak_memory(__file__, "prepare", name, device, dtype, size, device=device)
    in_place = name == "fasttune in place" or name.startswith("liger")
    gradients = 0 if in_place else size[0] * size[1] * getattr(torch, dtype).itemsize
    TABLE.add(case(device, dtype, size), name, peak=peak, gradients=gradients)
