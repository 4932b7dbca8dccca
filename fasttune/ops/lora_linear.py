"""A linear layer with a low-rank adapter (Hu et al., "LoRA", 2021) that saves next to nothing for its backward.

rows: all dimensions of x but the last, multiplied. in, out: the layer's features. r: the adapter's rank.

Forward    D [rows, in] = dropout(x),  S [rows, r] = D Aᵀ,  y [rows, out] = x Wᵀ + b + S (scale B)ᵀ
Backward   dS = dY (scale B),  dB = scale dYᵀ S,  dA = dSᵀ D,  dX = dY W + mask ∘ (dS A) / (1 - p)

Saved are x, S and the seed. D is drawn again in the backward, never kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops.dropout import DTYPES, NO_DOUBLE, check_p, draw_seed, seeded_dropout
from fasttune.ops.library import LIBRARY, OPS, Op, kernels, record_use

ops = torch.ops.fasttune


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ.

    x: [..., in], one dimension or more, strided or not; float64, float32, float16 or bfloat16.
    weight: [out, in] and bias: [out] or None, of x's dtype; meant to be frozen. If one of them requires a
        gradient it gets one, by a plain composition of PyTorch's ops (`backend` says so).
    lora_a: [r, in] and lora_b: [out, r], of any of these dtypes. Products are computed in x's dtype; gradients
        come back in the parameter's own.
    dropout: the probability for the adapter's input, in [0, 1]; nothing is dropped unless training.

    Returns [..., out] in x's dtype. Under autocast x, weight and bias are taken to its dtype first.
    The mask is that of `fasttune.ops.dropout` for one seed from torch's default CPU generator. A second
    backward (retain_graph) gives equal gradients; differentiating the backward raises NotImplementedError.

    Raises ValueError naming the argument, the shape or dtype or range expected and the one found.
    """
    check_p("dropout", dropout)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, lora_a, lora_b)
    record_use("lora_linear", x, weight)
    p = dropout if training else 0.0
    seed = draw_seed() if p > 0 else None
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if _refuses(x, weight, bias):
        y = lora_linear_reference(rows, weight, bias, lora_a, lora_b, scale, p, seed)
    else:
        y, _ = torch.ops.fasttune.lora_linear(rows, weight, bias, lora_a, lora_b, scale, p, seed)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """The specification, x [rows, in] -> [rows, out]: PyTorch's ops, differentiable in every argument."""
    dropped = x if seed is None else seeded_dropout(x, p, seed)
    low = F.linear(dropped, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + F.linear(low, scaled(lora_b, scale, x.dtype))


def scaled(lora_b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · B, rounded once to dtype. Folding the factor in here keeps it out of the large products."""
    return (lora_b.to(torch.promote_types(lora_b.dtype, torch.float32)) * scale).to(dtype)


def _trains_base(weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [out, in], found {list(weight.shape)}")
    outs, ins = weight.shape
    if x.dim() == 0 or x.shape[-1] != ins:
        raise ValueError(f"x: expected shape [..., {ins}] to fit weight, found {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (outs,):
        raise ValueError(f"bias: expected shape [{outs}] to fit weight, found {list(bias.shape)}")
    if lora_a.dim() != 2 or lora_a.shape[1] != ins:
        raise ValueError(f"lora_a: expected shape [r, {ins}] to fit weight, found {list(lora_a.shape)}")
    if tuple(lora_b.shape) != (outs, lora_a.shape[0]):
        expected = [outs, lora_a.shape[0]]
        raise ValueError(f"lora_b: expected shape {expected} to fit weight and lora_a, found {list(lora_b.shape)}")
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float64, float32, float16 or bfloat16, found {tensor.dtype}")
    for name, frozen in (("weight", weight), ("bias", bias)):
        if frozen is not None and frozen.dtype != x.dtype:
            raise ValueError(f"{name}: expected x's dtype {x.dtype}, found {frozen.dtype}")


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    low = ops.lora_down(x, lora_a.to(x.dtype), p, seed)
    y = F.linear(x, weight, bias)
    y.addmm_(low, scaled(lora_b, scale, x.dtype).t())
    return y, low


def _gradients(
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    dx, da, db = (x.new_empty(0) for _ in range(3))
    want_x, want_a, want_b = wanted
    dlow, up = ops.lora_up_backward(dy, low, scaled(lora_b, scale, x.dtype))
    if want_b:
        db = (up * scale).to(lora_b.dtype)
    if want_x:
        dx = dy @ weight
    if want_x or want_a:
        down = ops.lora_input_backward(x, dlow, lora_a.to(x.dtype), dx if want_x else None, p, seed)
        da = down.to(lora_a.dtype) if want_a else da
    return dx, da, db


def lora_down_reference(x: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """S [rows, r] = dropout(x) aᵀ."""
    return (x if seed is None else ops.dropout_seeded(x, p, seed)) @ a.t()


def lora_up_backward_reference(dy: Tensor, low: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """dS [rows, r] = dy b, and dyᵀ low [out, r] in float32 (float64 for float64)."""
    # r x out and turned: with out x r, the GEMM takes up to half as long again.
    up = (low.t() @ dy).t().to(torch.promote_types(dy.dtype, torch.float32))
    return dy @ b, up.contiguous()


def lora_down_backward_reference(x: Tensor, dlow: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dA [r, in] = dlowᵀ dropout(x), in float32 (float64 for float64)."""
    dropped = x if seed is None else ops.dropout_seeded(x, p, seed)
    return (dlow.t() @ dropped).to(torch.promote_types(x.dtype, torch.float32))


def lora_add_reference_(dx: Tensor, dlow: Tensor, a: Tensor, p: float, seed: Tensor | None) -> None:
    """dx [rows, in] += mask ∘ (dlow a) / (1 - p)."""
    if seed is None:
        dx.addmm_(dlow, a)
    else:
        ops.dropout_add_(dx, dlow @ a, p, seed)


def lora_input_backward_reference(
    x: Tensor, dlow: Tensor, a: Tensor, dx: Tensor | None, p: float, seed: Tensor | None
) -> Tensor:
    """Both of the above: what a kernel can do with one drawing of the mask."""
    if dx is not None:
        ops.lora_add_(dx, dlow, a, p, seed)
    return ops.lora_down_backward(x, dlow, p, seed)


LIBRARY.define("lora_down(Tensor x, Tensor a, float p, Tensor? seed) -> Tensor")
LIBRARY.define("lora_up_backward(Tensor dy, Tensor low, Tensor b) -> (Tensor, Tensor)")
LIBRARY.define("lora_down_backward(Tensor x, Tensor dlow, float p, Tensor? seed) -> Tensor")
LIBRARY.define("lora_add_(Tensor(a!) dx, Tensor dlow, Tensor a, float p, Tensor? seed) -> ()")
LIBRARY.define(
    "lora_input_backward(Tensor x, Tensor dlow, Tensor a, Tensor(a!)? dx, float p, Tensor? seed) -> Tensor"
)
for _name, _reference in (
    ("lora_down", lora_down_reference),
    ("lora_up_backward", lora_up_backward_reference),
    ("lora_down_backward", lora_down_backward_reference),
    ("lora_add_", lora_add_reference_),
    ("lora_input_backward", lora_input_backward_reference),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, float p,"
    " Tensor? seed) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor low, Tensor weight, Tensor lora_a, Tensor lora_b,"
    " float scale, float p, Tensor? seed, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("lora_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_backward", _gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::lora_linear", lib=LIBRARY)
def _(x, weight, bias, lora_a, lora_b, scale, p, seed):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@torch.library.register_fake("fasttune::lora_linear_backward", lib=LIBRARY)
def _(dy, x, low, weight, lora_a, lora_b, scale, p, seed, wanted):
    gradients = zip((x, lora_a, lora_b), wanted, strict=True)
    return tuple(x.new_empty(of.shape, dtype=of.dtype) if want else x.new_empty(0) for of, want in gradients)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, ctx.scale, ctx.p, seed = inputs
    _, low = output
    ctx.mark_non_differentiable(low)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, low, weight, lora_a, lora_b, seed)


def _backward(ctx, dy: Tensor | None, _):
    x, low, weight, lora_a, lora_b, seed = ctx.saved_tensors
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("fasttune::lora_linear has no gradient for weight and bias: use lora_linear")
    wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    if dy is None:
        return (None,) * 8
    got = torch.ops.fasttune.lora_linear_backward(
        dy, x, low, weight, lora_a, lora_b, ctx.scale, ctx.p, seed, wanted
    )
    dx, da, db = (grad if want else None for grad, want in zip(got, wanted, strict=True))
    return dx, None, None, da, db, None, None, None


def _no_second_order(ctx, *grads):
    raise NotImplementedError("lora_linear can be differentiated once, not twice")


# The compiled module has registered the same in C++ (csrc/autograd.cpp): less than half the time a call.
if kernels() is None:
    torch.library.register_autograd("fasttune::lora_linear", _backward, setup_context=_setup, lib=LIBRARY)
    torch.library.register_autograd("fasttune::lora_linear_backward", _no_second_order, lib=LIBRARY)


def _refuses(
    x: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *adapter: Tensor
) -> str | None:
    if x is not None and x.is_cuda and x.dtype == torch.float64:
        return NO_DOUBLE
    if weight is not None and _trains_base(weight, bias):
        return "weight or bias requires a gradient: a plain composition of PyTorch's ops computes it"
    return None


def _does(x: Tensor | None = None, *_: Tensor | None) -> str:
    if x is not None and x.is_cuda:
        return "PyTorch's GEMMs for the base, compiled kernels for the low-rank side"
    dtype = "float32" if x is None else str(x.dtype).removeprefix("torch.")
    compiled = kernels()
    if compiled is not None and dtype in compiled.lora_block_types():
        return "PyTorch's GEMMs for the base; the low-rank side in blocks, by oneDNN's small products"
    return f"PyTorch's GEMMs, masks by the compiled dropout kernel: no small products of {dtype} on this machine"


OPS["lora_linear"] = Op("lora_input_backward", _does, _refuses)
