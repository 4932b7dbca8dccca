"""Cross-entropy, forward and backward, against `F.cross_entropy`; the floor is a copy, one read and one write.

pytest bench/cross_entropy.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICES, Table, assert_close, keep_pages, peak_memory
from torch import Tensor

from fasttune.ops import cross_entropy

keep_pages()
SHAPES = {"cpu": (1024, 32000), "cuda": (8192, 128256)}
TABLE = Table("GB/s", floor="copy", base="torch")


class _Layer(torch.autograd.Function):
    """What hands the logits over: without it they would be a leaf, which nobody may overwrite."""

    @staticmethod
    def forward(ctx, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()


def fasttune(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target)


def fasttune_in_place(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, inplace=True)


def torch_(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def torch_compiled(logits: Tensor, target: Tensor) -> Tensor:
    return _compiled(logits, target)


_compiled = torch.compile(F.cross_entropy)
IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fasttune": fasttune,
    "fasttune in place": fasttune_in_place,
    "torch": torch_,
    "torch compiled": torch_compiled,
}
if torch.cuda.is_available() and find_spec("liger_kernel"):
    from liger_kernel.transformers.functional import liger_cross_entropy

    IMPLEMENTATIONS["liger (in place)"] = lambda logits, target: liger_cross_entropy(logits, target)


def prepare(name: str, device: str, dtype: str) -> Callable[[], object]:
    """One step: the loss and the gradient of the logits. "copy": the floor."""
    rows, classes = SHAPES[device]
    kept = torch.randn(rows, classes, device=device).to(getattr(torch, dtype))
    target = torch.randint(0, classes, (rows,), device=device)
    if name == "copy":
        other = torch.empty_like(kept)
        return lambda: other.copy_(kept)
    weight, function = torch.ones((), requires_grad=True), IMPLEMENTATIONS[name]

    def step() -> tuple[Tensor, Tensor]:
        logits = _Layer.apply(weight, kept)
        loss = function(logits, target)
        return loss, *torch.autograd.grad(loss, logits)

    return step


def check(name: str, device: str, dtype: str) -> None:
    torch.manual_seed(0)
    step = prepare(name, device, dtype)
    torch.manual_seed(0)
    rows, classes = SHAPES[device]
    logits = torch.randn(rows, classes, device=device).to(getattr(torch, dtype))
    target = torch.randint(0, classes, (rows,), device=device)
    logits, target = logits[:64].double().requires_grad_(), target[:64]
    exact = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum") / rows, logits)[0]
    assert_close(step()[1][:64], exact, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["copy", *IMPLEMENTATIONS])
def test_time(benchmark, name, dtype, device):
    if name != "copy":
        check(name, device, dtype)
    rows, classes = SHAPES[device]
    moved = 2 * rows * classes * getattr(torch, dtype).itemsize
    TABLE.time(benchmark, f"cross entropy, {rows} x {classes}, {dtype}, {device}", name,
               prepare(name, device, dtype), work=moved)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, dtype, device):
    rows, classes = SHAPES[device]
    peak = peak_memory(__file__, "prepare", name, device, dtype, device=device)
    in_place = name == "fasttune in place" or name.startswith("liger")
    gradients = 0 if in_place else rows * classes * getattr(torch, dtype).itemsize
    TABLE.add(f"cross entropy, {rows} x {classes}, {dtype}, {device}", name, peak=peak, gradients=gradients)
