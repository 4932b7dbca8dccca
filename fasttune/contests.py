"""What a benchmark of an op needs: inputs of one size, stock PyTorch's form of it, and the check before the clock.

`fasttune bench` runs these as they are; the files in bench/ add contenders, floors and peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune import ops

RANK, SCALE = 16, 2.0  # of a LoRA layer: alpha is twice the rank
LORA_DROPOUT, DROPOUT = 0.05, 0.1
CHECKED = 64  # rows and classes that are compared with float64

Step = Callable[[], tuple[Tensor, ...]]
"""Forward and backward: the result, then the gradients that are wanted."""


@dataclass(frozen=True)
class Contest:
    """An op at one size.

    arguments: what a contender's function is called with, before the dropout's probability.
    wanted: the arguments whose gradients are asked for. upstream: the result's gradient; None for a loss.
    dropout: the probability that is timed.
    check: gets a contender's step for any probability; raises AssertionError if a result is wrong.
    """

    arguments: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]
    upstream: Tensor | None
    dropout: float
    check: Callable[[Callable[[float], Step]], None]

    def step(self, function: Callable[..., Tensor], p: float | None = None) -> Step:
        """function: takes the arguments and the probability p, by default that of the contest."""

        def run() -> tuple[Tensor, ...]:
            result = function(*self.arguments, self.dropout if p is None else p)
            return result, *torch.autograd.grad(result, self.wanted, self.upstream)

        return run

    def checked(self, function: Callable[..., Tensor]) -> Step:
        """The step, after its check."""
        self.check(lambda p: self.step(function, p))
        return self.step(function)


def assert_close(what: str, found: Tensor, exact: Tensor, epsilon: float) -> None:
    """Error in norm, relative."""
    found, exact = found.detach().double(), exact.detach().double()
    error = float((found - exact).norm() / exact.norm())
    if not error <= epsilon:  # NaN too
        raise AssertionError(f"{what}: relative error {error:.1e}, above {epsilon:.1e}: not worth timing")


def _tolerance(dtype: torch.dtype) -> float:
    """A few roundings to the type, in norm."""
    return {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, generator=random).to(dtype)


def _labels(rows: int, classes: int, device: str) -> Tensor:
    return torch.randint(0, classes, (rows,), device=device, generator=torch.Generator(device).manual_seed(9))


def dropout(size: tuple[int, int], dtype: torch.dtype, device: str, p: float = DROPOUT) -> Contest:
    """size: rows, features. The functions take x and p."""
    x, upstream = (_normal(size, dtype, device, seed) for seed in (1, 2))
    x = torch.where(x == 0, 1, x).requires_grad_()  # so that a zero of the result tells what was dropped

    def check(step: Callable[[float], Step]) -> None:
        y, dx = step(p)()
        kept = y != 0
        share = float(kept.double().mean())
        five_sigma = 5 * (p * (1 - p) / kept.numel()) ** 0.5
        if abs(share - (1 - p)) > five_sigma:
            raise AssertionError(f"{share:.5f} of the elements were kept, not {1 - p} within {five_sigma:.5f}")
        for name, found, given in (("y", y, x), ("dx", dx, upstream)):
            assert_close(name, found, torch.where(kept, given.double() / (1 - p), 0), _tolerance(dtype))

    return Contest((x,), (x,), upstream, p, check)


def _assert_dropped(with_dropout: Tensor, without: Tensor, p: float) -> None:
    """Of what a random mask multiplies, it moves the share sqrt(p / (1 - p)) in norm; here to a quarter."""
    moved = float((with_dropout - without).detach().norm() / without.detach().norm())
    expected = (p / (1 - p)) ** 0.5
    if not 0.75 * expected < moved < 1.25 * expected:
        raise AssertionError(f"dropout {p} moves the result by {moved:.3f} in norm, not by about {expected:.3f}")


def lora_linear(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    p: float = LORA_DROPOUT,
    adapter: torch.dtype | None = None,
) -> Contest:
    """size: rows, in, out. The functions take x, weight, bias, lora_a, lora_b and p; the base is frozen.

    adapter: the type of lora_a and lora_b; that of the base if None.
    """
    rows, ins, outs = size
    adapter = adapter or dtype
    x = _normal((rows, ins), dtype, device, 1).requires_grad_()
    weight = (_normal((outs, ins), torch.float32, device, 2) / ins**0.5).to(dtype)
    bias = _normal((outs,), dtype, device, 3)
    a = (_normal((RANK, ins), torch.float32, device, 4) / ins**0.5).to(adapter).requires_grad_()
    b = (_normal((outs, RANK), torch.float32, device, 5) / RANK**0.5).to(adapter).requires_grad_()
    upstream = _normal((rows, outs), dtype, device, 6)

    def check(step: Callable[[float], Step]) -> None:
        epsilon = _tolerance(dtype)
        few, exact = slice(CHECKED), [t.detach().double() for t in (x, weight, bias, a, b, upstream)]
        x64, w64, bias64, a64, b64, dy64 = exact
        base_y, base_dx = F.linear(x64[few], w64, bias64), dy64[few] @ w64
        low_y, low_dx = SCALE * x64[few] @ a64.t() @ b64.t(), SCALE * dy64[few] @ b64 @ a64
        y, dx, da, db = step(0.0)()
        assert_close("y", y[few], base_y + low_y, epsilon)
        assert_close("dx", dx[few], base_dx + low_dx, epsilon)
        assert_close("dA", da, SCALE * (dy64 @ b64).t() @ x64, epsilon)
        assert_close("dB", db, SCALE * dy64.t() @ (x64 @ a64.t()), epsilon)
        # With dropout the adapter is a linear map in x, in A and in B: <dy, y> = <dx, x> row by row, and
        # <dA, A> = <dB, B> rank by rank, but only if all of them saw one mask.
        y, dx, da, db = (t.double() for t in step(p)())
        _assert_dropped(y[few] - base_y, low_y, p)
        _assert_dropped(dx[few] - base_dx, low_dx, p)
        forward, backward = (dy64[few] * (y[few] - base_y)).sum(1), ((dx[few] - base_dx) * x64[few]).sum(1)
        assert_close("the mask of dx", backward, forward, 2 * epsilon)
        assert_close("the mask of dA", (da * a64).sum(1), (db * b64).sum(0), 2 * epsilon)

    return Contest((x, weight, bias, a, b), (x, a, b), upstream, p, check)


def attention(size: tuple[int, ...], dtype: torch.dtype, device: str, p: float = DROPOUT) -> Contest:
    """size: batch, heads, length, width. The functions take query, key, value, mask and p, and return
    [batch, length, heads, width], contiguous. The mask hides some of the last tenth of the keys."""
    batch, heads, length, width = size
    # As a model has them: the heads of a position side by side.
    q, k, v = (
        _normal((batch, length, heads, width), dtype, device, seed).transpose(1, 2).requires_grad_()
        for seed in (1, 2, 3)
    )
    padding = torch.arange(batch, device=device) * length // (10 * batch)
    hidden = torch.arange(length, device=device) >= (length - padding)[:, None]
    mask = torch.zeros(batch, 1, 1, length, dtype=dtype, device=device)
    mask.masked_fill_(hidden[:, None, None], torch.finfo(dtype).min)
    upstream = _normal((batch, length, heads, width), dtype, device, 4)

    def check(step: Callable[[float], Step]) -> None:
        epsilon = _tolerance(dtype)
        inputs = [t[-1:].detach().double().requires_grad_() for t in (q, k, v)]
        exact = plain_attention(inputs[0], inputs[1], inputs[2], mask[-1:].double(), 0.0)
        gradients = torch.autograd.grad(exact, inputs, upstream[-1:].double())
        out, *found = step(0.0)()
        assert_close("out", out[-1:], exact, epsilon)
        for name, got, right in zip(("dq", "dk", "dv"), found, gradients, strict=True):
            assert_close(name, got[-1:], right, epsilon)
        # A linear map of v, whose transpose the backward has if it drew the same mask. No such identity holds for
        # query and key: that their gradients have the mask too is left to the op's tests.
        if p:
            out, _, _, dv = (t.double() for t in step(p)())
            _assert_dropped(out[-1:], exact, p)
            forward = (out * upstream.double()).sum((1, 3))
            assert_close("the mask of dv", (dv * v.double()).sum((2, 3)), forward, 2 * epsilon)

    return Contest((q, k, v, mask), (q, k, v), upstream, p, check)


def batch_norm(size: tuple[int, ...], dtype: torch.dtype, device: str, strided: bool = False) -> Contest:
    """size: images, channels, height, width, in channels_last and in training. The functions take x, weight and
    bias (and a probability that means nothing).

    strided: the result's gradient is a slice of a longer sequence, as of a detector's levels side by side.
    """
    images, channels, height, width = size
    pixels = height * width
    x = _normal((images, pixels, channels), dtype, device, 1).transpose(1, 2).view(size).requires_grad_()
    weight, bias = (_normal((channels,), torch.float32, device, seed).requires_grad_() for seed in (2, 3))
    upstream = _normal((images, pixels + strided, channels), dtype, device, 4)
    upstream = upstream[:, :pixels].transpose(1, 2).unflatten(2, (height, width))

    def check(step: Callable[[float], Step]) -> None:
        inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        exact = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True)
        gradients = torch.autograd.grad(exact, inputs, upstream.double())
        for name, found, right in zip(
            ("y", "dx", "dweight", "dbias"), step(0.0)(), (exact, *gradients), strict=True
        ):
            assert_close(name, found, right, _tolerance(dtype))

    return Contest((x, weight, bias), (x, weight, bias), upstream, 0.0, check)


def deformable_attention(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Contest:
    """size: batch, heads, width of a head, queries, side of the first of `maps_of`, points a map. The functions
    take value, locations and weights (and a probability that means nothing). Locations and weights are float32, as
    autocast leaves them."""
    batch, heads, width, queries, side, points = size
    sides = torch.tensor([side >> level for level in range(3)], device=device)
    value = _normal((batch, int(sides.square().sum()), heads, width), dtype, device, 1).requires_grad_()
    centres = torch.rand((batch, queries, 1, 1, 1, 2), generator=torch.Generator().manual_seed(2)).to(device)
    around = centres + 0.1 * _normal((batch, queries, heads, 3, points, 2), torch.float32, device, 3)
    # Off the pixels' centres, where rounding decides which side's derivative is taken.
    pixels = around * sides[:, None, None] - 0.5
    off = pixels - pixels.floor()
    locations = ((pixels.floor() + 0.2 + 0.6 * off + 0.5) / sides[:, None, None]).requires_grad_()
    weights = _normal((batch, queries, heads, 3 * points), torch.float32, device, 4).softmax(-1)
    weights = weights.unflatten(3, (3, points)).requires_grad_()
    upstream = _normal((batch, queries, heads * width), dtype, device, 5)

    def check(step: Callable[[float], Step]) -> None:
        inputs = [t[-1:].detach().double().requires_grad_() for t in (value, locations, weights)]
        exact = torch_deformable_attention(inputs[0], inputs[1], inputs[2], 0.0)
        gradients = torch.autograd.grad(exact, inputs, upstream[-1:].double())
        names = "out", "dvalue", "dlocations", "dweights"
        for name, found, right in zip(names, step(0.0)(), (exact, *gradients), strict=True):
            assert_close(name, found[-1:], right, _tolerance(dtype))

    inputs = value, locations, weights
    return Contest(inputs, inputs, upstream, 0.0, check)


def maps_of(value: Tensor) -> list[tuple[int, int]]:
    """Three square maps, each of half the side of the one before."""
    side = math.isqrt(value.shape[1] * 16 // 21)
    return [(side >> level, side >> level) for level in range(3)]


def cross_entropy(size: tuple[int, int], dtype: torch.dtype, device: str) -> Contest:
    """size: rows, classes. The functions take logits and target (and a probability that means nothing)."""
    rows, classes = size
    logits = _normal(size, dtype, device, 1).requires_grad_()
    target = _labels(rows, classes, device)

    def check(step: Callable[[float], Step]) -> None:
        few = logits[:CHECKED].detach().double().requires_grad_()
        loss = F.cross_entropy(few, target[:CHECKED], reduction="sum") / rows
        assert_close("dlogits", step(0.0)()[1][:CHECKED], torch.autograd.grad(loss, few)[0], _tolerance(dtype))

    return Contest((logits, target), (logits,), None, 0.0, check)


def linear_cross_entropy(
    size: tuple[int, int, int], dtype: torch.dtype, device: str, trained: bool = False
) -> Contest:
    """size: rows, features, classes. The functions take hidden, weight and target (and a probability that means
    nothing). trained: whether the head's gradient is wanted too."""
    rows, features, classes = size
    hidden = _normal((rows, features), dtype, device, 1).requires_grad_()
    weight = (_normal((classes, features), torch.float32, device, 2) / features**0.5).to(dtype)
    weight.requires_grad_(trained)
    target = _labels(rows, classes, device)

    def check(step: Callable[[float], Step]) -> None:
        h, w = hidden.detach().float(), weight.detach().float()
        p = F.linear(h, w).softmax(-1)
        p[torch.arange(rows, device=device), target] -= 1
        p /= rows
        _, dhidden, *dweight = step(0.0)()
        assert_close("dhidden", dhidden[:CHECKED], p[:CHECKED] @ w, _tolerance(dtype))
        if trained:
            assert_close("dweight", dweight[0][:CHECKED], p[:, :CHECKED].t() @ h, _tolerance(dtype))

    return Contest((hidden, weight, target), (hidden, weight) if trained else (hidden,), None, 0.0, check)


def torch_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, _: float) -> Tensor:
    return F.batch_norm(x, *_running(weight), weight, bias, training=True)


def _running(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(weight), torch.ones_like(weight)


def torch_lora(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    """PEFT's composition."""
    y = F.linear(x, weight, bias)
    return (y + F.linear(F.linear(F.dropout(x.to(a.dtype), p), a), b) * SCALE).to(y.dtype)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float, drop: Callable[[Tensor, float], Tensor] = F.dropout
) -> Tensor:
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask).softmax(-1)
    return (drop(weights, p) @ v).transpose(1, 2).contiguous()


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2).contiguous()


def torch_deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, _: float) -> Tensor:
    """transformers' form, by grid_sample, which autocast computes in float32."""
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

    with torch.autocast(value.device.type, torch.bfloat16, enabled=value.dtype == torch.bfloat16):
        out = MultiScaleDeformableAttention()(value, None, maps_of(value), None, locations, weights, 64)
    return out.to(value.dtype)


OURS: Mapping[str, Callable[..., Any]] = {
    "dropout": lambda x, p: ops.dropout(x, p, training=True),
    "lora_linear": lambda x, weight, bias, a, b, p: ops.lora_linear(
        x, weight, bias, a, b, scale=SCALE, dropout=p, training=True
    ),
    "cross_entropy": lambda logits, target, _: ops.cross_entropy(logits, target),
    "linear_cross_entropy": lambda hidden, weight, target, _: ops.linear_cross_entropy(hidden, weight, target),
    "attention": lambda q, k, v, mask, p: ops.attention(
        q, k, v, mask, scale=q.shape[-1] ** -0.5, dropout=p, training=True
    ),
    "batch_norm": lambda x, weight, bias, _: ops.batch_norm(x, *_running(weight), weight, bias, training=True),
    "deformable_attention": lambda value, locations, weights, _: ops.deformable_attention(
        value, maps_of(value), locations, weights
    ),
}

STOCK: Mapping[str, Mapping[str, Callable[..., Tensor]]] = {
    "dropout": {"F.dropout": F.dropout},
    "lora_linear": {"PEFT's form": torch_lora},
    "cross_entropy": {"F.cross_entropy": lambda logits, target, _: F.cross_entropy(logits, target)},
    "linear_cross_entropy": {
        "F.linear, F.cross_entropy": lambda hidden, weight, target, _: F.cross_entropy(
            F.linear(hidden, weight), target
        )
    },
    "attention": {"sdpa": torch_attention, "softmax(q kᵀ) v": plain_attention},
    "batch_norm": {"F.batch_norm": torch_batch_norm},
    "deformable_attention": {"grid_sample": torch_deformable_attention},
}
