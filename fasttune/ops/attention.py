"""Attention that keeps no scores: softmax(q kᵀ · scale + mask) with dropout on the weights, times v.

b: batch rows. h: query heads. g: query heads that share one key head, so h/g key heads. d: width of a head.
q, k as dimensions: queries, keys.

Forward    W [b, h, q, k] = softmax(Q Kᵀ · scale + mask),  O [b, q, h, d] = drop(W) V
Backward   dV = drop(W)ᵀ dO,  dW = drop(dO Vᵀ),  dS = scale · W ∘ (dW - rowsum(W ∘ dW)),  dQ = dS K,  dK = dSᵀ Q

Saved are Q, K, V, the seed and two numbers a row of scores; W is computed again (Dao et al., FlashAttention, 2022;
there rowsum(W ∘ dW) is taken from O ∘ dO, whose other roundings don't cancel where one weight is nearly 1). The
mask of the dropout is that of `fasttune.ops.dropout` on W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops.dropout import check_p, draw_seed, dropout_reference
from fasttune.ops.library import LIBRARY, OPS, Op, kernels, record_use

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """softmax(query keyᵀ · scale + mask) value, with dropout on the weights.

    query: [b, h, q, d]; key, value: [b, h/g, k, d] with one key or more, of query's floating-point dtype; strided
        or not.
    mask: added to the scaled scores, of query's dtype or float32, broadcast to [b, h, q, k]; gets no gradient.
    dropout: the probability for a weight, in [0, 1]; nothing is dropped unless training.

    Returns [b, q, h, d], contiguous, in query's dtype. Scores, softmax and dropout are computed in float32
    (float64 for float64); the reference rounds the scores to query's dtype first, as its product does. A row of
    scores that is all -inf gives NaN, as torch.softmax does. Under autocast query, key and value are taken to its
    dtype first; the mask is not, since float32's lowest number is -inf in bfloat16. Differentiating the backward
    raises NotImplementedError. Other dtypes than float32 and bfloat16, and CPUs that the kernel is not for
    (`backend` says so), run the reference as it stands, and autograd keeps its scores.

    Raises ValueError naming the argument, the shape or dtype expected and the one found.
    """
    check_p("dropout", dropout)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, mask)
    record_use("attention", query)
    p = dropout if training else 0.0
    seed = draw_seed() if p > 0 else None
    run = attention_reference if _refuses(query) else torch.ops.fasttune.attention
    out, _ = run(query, key, value, mask, scale, p, seed)
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if query.dim() != 4 or not query.is_floating_point():
        raise ValueError(
            f"query: expected floating-point [b, h, q, d], found {query.dtype} of shape {list(query.shape)}"
        )
    b, heads, queries, width = query.shape
    fits = key.dim() == 4 and (key.shape[0], key.shape[3]) == (b, width) and min(key.shape[1:3]) > 0
    if not fits or heads % key.shape[1]:
        expected = f"[{b}, a divisor of {heads}, 1 or more, {width}]"
        raise ValueError(f"key: expected {expected}, found {list(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {list(key.shape)}, found {list(value.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: expected query's dtype {query.dtype}, found {tensor.dtype}")
    if mask is None:
        return
    full = (b, heads, queries, key.shape[2])
    fits = mask.dim() <= 4 and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
    if not fits or mask.dtype not in (query.dtype, torch.float32):
        expected = f"{query.dtype} or float32 of a shape that broadcasts to {list(full)}"
        raise ValueError(f"mask: expected {expected}, found {mask.dtype} of shape {list(mask.shape)}")
    if mask.requires_grad:
        raise ValueError("mask: expected a tensor without gradient, found one that requires it")


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query, _shared(key, query).transpose(2, 3)).to(wide) * scale
    return scores if mask is None else scores + mask


def _shared(key: Tensor, query: Tensor) -> Tensor:
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The specification: the result, [b, q, h, d], and what the backward needs of each row of scores: their
    maximum and 1 / Σ exp(score - maximum), [b, h, q, 2]."""
    scores = _scores(query, key, mask, scale)
    top = scores.amax(-1, keepdim=True)
    exponents = (scores - top).exp()
    inverse = 1.0 / exponents.sum(-1, keepdim=True)
    weights = exponents * inverse
    dropped = weights if seed is None else dropout_reference(weights, p, seed)
    out = torch.matmul(dropped.to(query.dtype), _shared(value, query)).transpose(1, 2)
    return out.contiguous(), torch.cat((top, inverse), dim=-1)


def attention_backward_reference(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """dout: [b, q, h, d]. Returns the gradients of query, key and value, of their shapes, over memory in which
    the heads of a position lie side by side, as the layers before attention have them."""
    top, inverse = stats.split(1, dim=-1)
    weights = (_scores(query, key, mask, scale) - top).exp() * inverse
    gradient = dout.transpose(1, 2)
    dweights = torch.matmul(gradient, _shared(value, query).transpose(2, 3)).to(weights.dtype)
    dropped = weights
    if seed is not None:
        dropped, dweights = dropout_reference(weights, p, seed), dropout_reference(dweights, p, seed)
    correction = (weights * dweights).sum(-1, keepdim=True)
    dscores = (scale * weights * (dweights - correction)).to(query.dtype)
    dquery = torch.matmul(dscores, _shared(key, query))
    dkey = torch.matmul(dscores.transpose(2, 3), query)
    dvalue = torch.matmul(dropped.to(query.dtype).transpose(2, 3), gradient)
    b, heads, keys, width = key.shape
    grouped = (b, heads, query.shape[1] // heads, keys, width)
    gradients = dquery, dkey.view(grouped).sum(2), dvalue.view(grouped).sum(2)
    return tuple(of.transpose(1, 2).contiguous().transpose(1, 2) for of in gradients)


LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float p, Tensor? seed)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? mask,"
    " Tensor stats, float scale, float p, Tensor? seed) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("attention", attention_reference, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", attention_backward_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::attention", lib=LIBRARY)
def _(query, key, value, mask, scale, p, seed):
    b, heads, queries, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(b, queries, heads, width), query.new_empty(b, heads, queries, 2, dtype=wide)


@torch.library.register_fake("fasttune::attention_backward", lib=LIBRARY)
def _(dout, query, key, value, mask, stats, scale, p, seed):
    return tuple(of.new_empty(of.transpose(1, 2).shape).transpose(1, 2) for of in (query, key, value))


def _setup(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.scale, ctx.p, seed = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, mask, stats, seed)


def _backward(ctx, dout: Tensor | None, _):
    if dout is None:
        return (None,) * 7
    query, key, value, mask, stats, seed = ctx.saved_tensors
    gradients = torch.ops.fasttune.attention_backward(dout, query, key, value, mask, stats, ctx.scale, ctx.p, seed)
    return *gradients, None, None, None, None


def _no_second_order(ctx, *grads):
    raise NotImplementedError("attention can be differentiated once, not twice")


torch.library.register_autograd("fasttune::attention", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("fasttune::attention_backward", _no_second_order, lib=LIBRARY)


def _refuses(query: Tensor | None = None, *_: Tensor | None) -> str | None:
    dtype = torch.float32 if query is None else query.dtype
    if dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32 and bfloat16, not {dtype}"
    if (query is None or query.device.type == "cpu") and not _has_products(dtype):
        return f"oneDNN has no small products of {dtype} for this CPU, or is switched off"
    return None


@torch.compiler.assume_constant_result
def _has_products(dtype: torch.dtype) -> bool:
    """True without a kernel too: what runs then is the reference, by the same op."""
    compiled = kernels()
    return compiled is None or str(dtype).removeprefix("torch.") in compiled.attention_types()


OPS["attention"] = Op(
    "attention", "oneDNN's small products, a head at a time, around the compiled softmax", _refuses
)
