"""Linear + cross-entropy, forward and backward; the floor is its two GEMMs, three if the head is trained.

pytest bench/linear_cross_entropy.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICES, Table, assert_close, keep_pages, peak_memory
from torch import Tensor

from fasttune.ops import linear_cross_entropy

keep_pages()
SHAPES = {"cpu": (1024, 768, 32000), "cuda": (8192, 4096, 128256)}
TABLE = Table("GFLOP/s", floor="gemms", base="torch")


def torch_(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fasttune": linear_cross_entropy,
    "torch": torch_,
    "torch compiled": torch.compile(torch_),
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    IMPLEMENTATIONS["torch, its chunks"] = lambda hidden, weight, target: F.linear_cross_entropy(
        hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions()
    )
if torch.cuda.is_available() and find_spec("liger_kernel"):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    IMPLEMENTATIONS["liger"] = lambda hidden, weight, target: liger_fused_linear_cross_entropy(
        hidden, weight, target
    )
if torch.cuda.is_available() and find_spec("cut_cross_entropy"):
    from cut_cross_entropy import linear_cross_entropy as cut

    IMPLEMENTATIONS["cut-cross-entropy"] = lambda hidden, weight, target: cut(hidden, weight, target)


def inputs(device: str, dtype: str, head: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, classes = SHAPES[device]
    torch.manual_seed(0)
    hidden = torch.randn(rows, features, device=device).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(classes, features, device=device) / features**0.5).to(hidden.dtype)
    return hidden, weight.requires_grad_(head == "trained"), torch.randint(0, classes, (rows,), device=device)


def prepare(name: str, device: str, dtype: str, head: str) -> Callable[[], object]:
    """One step: the loss and the gradients of hidden and, if it is trained, of the head. "gemms": the floor."""
    hidden, weight, target = inputs(device, dtype, head)
    wanted = (hidden, weight) if head == "trained" else (hidden,)
    if name == "gemms":
        return _gemms(hidden.detach(), weight.detach(), head)

    def step() -> tuple[Tensor, ...]:
        loss = IMPLEMENTATIONS[name](hidden, weight, target)
        return loss, *torch.autograd.grad(loss, wanted)

    return step


def _gemms(hidden: Tensor, weight: Tensor, head: str) -> Callable[[], object]:
    logits = hidden @ weight.t()
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        if head == "trained":
            torch.mm(logits.t(), hidden, out=dweight)

    return step


def check(name: str, device: str, dtype: str, head: str) -> None:
    """The gradient of 64 rows of hidden and, over all rows, of 64 classes of the head."""
    hidden, weight, target = (x.detach() for x in inputs(device, dtype, head))
    _, dhidden, *dweight = prepare(name, device, dtype, head)()
    p = F.linear(hidden.float(), weight.float()).softmax(-1)
    p[torch.arange(len(target)), target] -= 1
    p /= len(target)
    epsilon = 1e-4 if dtype == "float32" else 2e-2
    assert_close(dhidden[:64], p[:64] @ weight.float(), epsilon)
    if head == "trained":
        assert_close(dweight[0][:64], p[:, :64].t() @ hidden.float(), epsilon)


def case(device: str, dtype: str, head: str) -> str:
    rows, features, classes = SHAPES[device]
    return f"linear + cross entropy, {rows} x {features} x {classes}, {dtype}, head {head}, {device}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("name", ["gemms", *IMPLEMENTATIONS])
def test_time(benchmark, name, head, dtype, device):
    if name != "gemms":
        check(name, device, dtype, head)
    rows, features, classes = SHAPES[device]
    work = (3 if head == "trained" else 2) * 2 * rows * features * classes
    TABLE.time(benchmark, case(device, dtype, head), name, prepare(name, device, dtype, head), work=work)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, head, dtype, device):
    rows, features, classes = SHAPES[device]
    elements = rows * features + (classes * features if head == "trained" else 0)
    peak = peak_memory(__file__, "prepare", name, device, dtype, head, device=device)
    TABLE.add(case(device, dtype, head), name, peak=peak, gradients=elements * getattr(torch, dtype).itemsize)
