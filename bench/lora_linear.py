"""A frozen linear layer with a low-rank adapter, dropout before it, forward and backward, against PEFT's layer.

Rows of a MiniLM step (32 texts of 90 tokens), rank 16. The floor has no dropout: the frozen layer's two products
and the adapter's own six.

pytest bench/lora_linear.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import Table, peak_memory, sized
from torch import Tensor, nn

from fasttune import contests
from fasttune.contests import LORA_DROPOUT, RANK, SCALE, Contest, Step

SIZES = {  # rows, in, out
    "cpu": [(2880, ins, outs) for ins, outs in ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072))],
    "cuda": [(8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096)],
}
DTYPES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]  # of base and adapter
TABLE = Table("GFLOP/s", floor="floor", base="peft")
FUNCTIONS = {
    "fasttune": contests.OURS["lora_linear"],
    "torch": contests.torch_lora,
    "torch compiled": torch.compile(contests.torch_lora),
}


def peft_layer(contest: Contest) -> nn.Module:
    """The LoRA layer of PEFT's model of one linear layer, with the contest's weights."""
    from peft import LoraConfig, get_peft_model

    _, weight, bias, a, b = contest.arguments
    model = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)})
    model["layer"].weight.data, model["layer"].bias.data = weight, bias
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, lora_dropout=LORA_DROPOUT, target_modules=["layer"])
    model = get_peft_model(model, config, autocast_adapter_dtype=a.dtype != weight.dtype)
    layer = model.train().base_model.model["layer"]
    assert type(layer).__module__ == "peft.tuners.lora.layer"
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.detach(), b.detach()
    return layer


def peft_step(contest: Contest, p: float = LORA_DROPOUT) -> Step:
    layer = peft_layer(contest)
    if p == 0:
        layer.lora_dropout["default"] = nn.Identity()
    x = contest.arguments[0]
    wanted = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, wanted, contest.upstream)

    return run


def products(contest: Contest) -> Step:
    x, weight, bias, a, b = (t.detach() for t in contest.arguments)
    a, b, dy = a.to(x.dtype), b.to(x.dtype), contest.upstream

    def step() -> tuple[Tensor, ...]:
        low = x @ a.t()
        y = F.linear(x, weight, bias).addmm_(low, b.t())
        dlow = dy @ b
        dx = (dy @ weight).addmm_(dlow, a)
        # r x out and turned: with out x r, the GEMM takes up to half as long again.
        return y, dx, dlow.t() @ x, low.t() @ dy

    return step


def prepare(name: str, device: str, dtypes: list[str], size: tuple[int, int, int]) -> Callable[[], object]:
    """One step: y and the gradients of x, A and B. "floor": its products; "base alone": the frozen layer's."""
    dtype, adapter = (getattr(torch, name) for name in dtypes)
    contest = contests.lora_linear(tuple(size), dtype, device, adapter=adapter)
    if name == "floor":
        return products(contest)
    if name == "base alone":
        x, weight, bias, *_ = (t.detach() for t in contest.arguments)
        return lambda: (F.linear(x, weight, bias), contest.upstream @ weight)
    if name == "peft":
        contest.check(lambda p: peft_step(contest, p))
        return peft_step(contest)
    return contest.checked(FUNCTIONS[name])


def case(device: str, dtypes: tuple[str, str], size: tuple[int, int, int]) -> str:
    return f"lora linear, {' x '.join(map(str, size))}, {dtypes[0]}, adapter {dtypes[1]}, {device}"


@sized(SIZES)
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_time(benchmark, dtypes, device, size):
    names = ("base alone", "floor", "fasttune", "peft", "torch", "torch compiled")
    calls = {name: prepare(name, device, dtypes, size) for name in names}
    rows, ins, outs = size
    work = 4 * rows * ins * outs + 2 * 3 * rows * RANK * (ins + outs)
    TABLE.race(benchmark, case(device, dtypes, size), calls, work=work)


@sized(SIZES)
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("name", ["peft", *FUNCTIONS])
def test_peak_memory(name, dtypes, device, size):
    rows, ins, outs = size
    peak = peak_memory(__file__, "prepare", name, device, dtypes, size, device=device)
    dtype, adapter = (getattr(torch, name).itemsize for name in dtypes)
    TABLE.add(
        case(device, dtypes, size), name, peak=peak, gradients=rows * ins * dtype + RANK * (ins + outs) * adapter
    )
