"""Linear + cross-entropy, forward and backward; the floor is its two GEMMs, three if the head is trained.

pytest bench/linear_cross_entropy.py --benchmark-enable
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
from fasttune.ops import linear_cross_entropy

SIZES = {"cpu": [(1024, 768, 32000)], "cuda": [(8192, 4096, 128256)]}  # rows, features, classes
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


def prepare(name: str, device: str, dtype: str, size: tuple[int, int, int], head: str) -> Callable[[], object]:
    """One step: the loss and the gradients of hidden and, if it is trained, of the head. "gemms": the floor."""
    contest = contests.linear_cross_entropy(tuple(size), getattr(torch, dtype), device, head == "trained")
    if name == "gemms":
        hidden, weight, _ = (t.detach() for t in contest.arguments)
        return _gemms(hidden, weight, head)
    return contest.checked(lambda hidden, weight, target, _: IMPLEMENTATIONS[name](hidden, weight, target))


def _gemms(hidden: Tensor, weight: Tensor, head: str) -> Callable[[], object]:
    logits = hidden @ weight.t()
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        if head == "trained":
            torch.mm(logits.t(), hidden, out=dweight)

    return step


def case(device: str, dtype: str, size: tuple[int, int, int], head: str) -> str:
    return f"linear + cross entropy, {' x '.join(map(str, size))}, {dtype}, head {head}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_time(benchmark, head, dtype, device, size):
    calls = {name: prepare(name, device, dtype, size, head) for name in ("gemms", *IMPLEMENTATIONS)}
    rows, features, classes = size
    work = (3 if head == "trained" else 2) * 2 * rows * features * classes
    TABLE.race(benchmark, case(device, dtype, size, head), calls, work=work)


@sized(SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_peak_memory(name, head, dtype, device, size):
    rows, features, classes = size
    elements = rows * features + (classes * features if head == "trained" else 0)
    peak = peak_memory(__file__, "prepare", name, device, dtype, size, head, device=device)
    gradients = elements * getattr(torch, dtype).itemsize
    TABLE.add(case(device, dtype, size, head), name, peak=peak, gradients=gradients)
