"""Batch normalisation of images in channels_last: y = (x - mean) / sqrt(variance + eps) · weight + bias.

n, c, h, w: images, channels, height, width; N = n·h·w values a channel.

Training   mean, variance [c] of the batch, variance = Σ (x - mean)² / N
           dbias = Σ dy,  dweight = Σ dy · x̂ with x̂ = (x - mean) / sqrt(variance + eps)
           dx = weight / sqrt(variance + eps) · (dy - dbias / N - x̂ · dweight / N)
Evaluation mean, variance as given;  dx = weight / sqrt(variance + eps) · dy

Source: Ioffe & Szegedy, Batch Normalization, arXiv 1502.03167.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops.library import LIBRARY, OPS, Op, has_kernel, kernels, record_use

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_CHANNELS = (0, 2, 3)  # what a channel's values lie along
Gradients = tuple[Tensor, Tensor, Tensor]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What `torch.nn.functional.batch_norm` computes, on [n, c, h, w].

    x: floating point; the kernel takes float32 and bfloat16 in channels_last, all else runs PyTorch's own.
    running_mean, running_var: [c], float32 or of x's dtype. In training, where they are given, they become
        (1 - momentum) of themselves and momentum of the batch's mean and unbiased variance; else x is normalised
        by them.
    weight, bias: [c], float32 or of x's dtype; None stands for 1 and 0.

    Returns a tensor of x's shape, dtype and layout. Statistics and arithmetic are float32 with one rounding at the
    end, sums of many values float64; the bits depend neither on the number of threads nor on the instruction set.
    Of x in another layout, of another dtype or on another device PyTorch's numerics hold. An incoming gradient of
    other strides is copied into channels_last. Differentiating the kernel's backward raises NotImplementedError.

    Raises ValueError naming the argument, the shape or dtype expected and the one found; in training also if there
    is but one value a channel.
    """
    _check(x, running_mean, running_var, weight, bias, training)
    record_use("batch_norm", x)
    if not _runs_kernel(x):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return torch.ops.fasttune.batch_norm_fixed(x, weight, bias, running_mean, running_var, eps)
    y, mean, variance = torch.ops.fasttune.batch_norm(x, weight, bias, eps)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        values = x.numel() // x.shape[1]
        running_var.lerp_((variance * (values / (values - 1))).to(running_var.dtype), momentum)
    return y


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point [n, c, h, w], found {x.dtype} of shape {list(x.shape)}")
    channels = x.shape[1]
    given = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise ValueError(f"{name}: expected shape [{channels}] to fit x, found {list(tensor.shape)}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: expected {x.dtype} or float32, found {tensor.dtype}")
    if not training:
        for name in ("running_mean", "running_var"):
            if given[name] is None:
                raise ValueError(f"{name}: expected a tensor where training is false, found None")
    elif x.numel() == channels:
        raise ValueError(f"x: expected more than one value a channel in training, found shape {list(x.shape)}")


def _runs_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and _COMPILED and _refuses(x) is None


def _broad(of: Tensor) -> Tensor:
    """[c] as [c, 1, 1], in float32 or wider."""
    return of.to(torch.promote_types(of.dtype, torch.float32))[:, None, None]


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """x̂, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - _broad(mean)) * (_broad(variance) + eps).rsqrt()


def batch_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: y [n, c, h, w], and mean and variance [c] of the batch, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, _CHANNELS, correction=0)
    return batch_norm_fixed_reference(x, weight, bias, mean, variance, eps), mean, variance


def batch_norm_fixed_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """y [n, c, h, w] by statistics that are given."""
    y = _normalised(x, mean, variance, eps)
    y = y if weight is None else y * _broad(weight)
    y = y if bias is None else y + _broad(bias)
    return torch.empty_like(x).copy_(y)


def batch_norm_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    batch_statistics: bool,
    wanted: list[bool],
) -> Gradients:
    """The gradients of x, weight and bias that are wanted, the others empty. batch_statistics: whether mean and
    variance are x's own. x may be None where they are not and dx alone is wanted."""
    gradient = dy.to(torch.promote_types(dy.dtype, torch.float32))
    dx = gradient
    dweight, dbias = gradient.new_zeros(0), gradient.sum(_CHANNELS)
    if x is not None:
        normalised = _normalised(x, mean, variance, eps)
        dweight = (gradient * normalised).sum(_CHANNELS)
        if batch_statistics:
            values = dy.numel() // dy.shape[1]
            dx = gradient - _broad(dbias / values) - normalised * _broad(dweight / values)
    dx = dx * (_broad(variance) + eps).rsqrt()
    dx = dx if weight is None else dx * _broad(weight)
    results = _empty_gradients(dy, weight, wanted)
    for result, found, want in zip(results, (dx, dweight, dbias), wanted, strict=True):
        if want:
            result.copy_(found)
    return results


def _empty_gradients(dy: Tensor, weight: Tensor | None, wanted: list[bool]) -> Gradients:
    channels = dy.new_empty(dy.shape[1], dtype=torch.float32 if weight is None else weight.dtype)
    if dy.dtype == torch.float64 and weight is None:
        channels = channels.double()
    none = dy.new_empty(0)
    dx = torch.empty_like(dy, memory_format=torch.channels_last) if wanted[0] else none
    dweight, dbias = (torch.empty_like(channels) if want else channels[:0].clone() for want in wanted[1:])
    return dx, dweight, dbias


LIBRARY.define("batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "batch_norm_fixed(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps) -> Tensor"
)
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor mean, Tensor variance, float eps,"
    " bool batch_statistics, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("batch_norm", batch_norm_reference, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_fixed", batch_norm_fixed_reference, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_backward", batch_norm_backward_reference, "CompositeExplicitAutograd")
_COMPILED = has_kernel("batch_norm", "cpu")  # asked once: a small batch norm takes as long as the question


@torch.library.register_fake("fasttune::batch_norm", lib=LIBRARY)
def _(x, weight, bias, eps):
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, variance = (x.new_empty(x.shape[1], dtype=wide) for _ in range(2))
    return torch.empty_like(x), mean, variance


@torch.library.register_fake("fasttune::batch_norm_fixed", lib=LIBRARY)
def _(x, weight, bias, mean, variance, eps):
    return torch.empty_like(x)


@torch.library.register_fake("fasttune::batch_norm_backward", lib=LIBRARY)
def _(dy, x, weight, mean, variance, eps, batch_statistics, wanted):
    return _empty_gradients(dy, weight, wanted)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, ctx.eps = inputs
    _, mean, variance = output
    ctx.batch_statistics = True
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, variance)


def _setup_fixed(ctx, inputs, output) -> None:
    x, weight, _, mean, variance, ctx.eps = inputs
    ctx.batch_statistics = False
    ctx.set_materialize_grads(False)
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if needs_x else None, weight, mean, variance)


def _gradients(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    wanted = list(ctx.needs_input_grad[:3])
    backward = torch.ops.fasttune.batch_norm_backward
    found = backward(dy, *ctx.saved_tensors, ctx.eps, ctx.batch_statistics, wanted)
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


def _backward(ctx, dy: Tensor | None, *_):
    return *_gradients(ctx, dy), None


def _backward_fixed(ctx, dy: Tensor | None):
    return *_gradients(ctx, dy), None, None, None


def _no_second_order(ctx, *grads):
    raise NotImplementedError("batch_norm can be differentiated once, not twice")


# The compiled module has registered the same in C++ (csrc/autograd_batch_norm.cpp).
if kernels() is None:
    torch.library.register_autograd("fasttune::batch_norm", _backward, setup_context=_setup, lib=LIBRARY)
    torch.library.register_autograd(
        "fasttune::batch_norm_fixed", _backward_fixed, setup_context=_setup_fixed, lib=LIBRARY
    )
    torch.library.register_autograd("fasttune::batch_norm_backward", _no_second_order, lib=LIBRARY)


def _refuses(x: Tensor | None = None, *_: Tensor | None) -> str | None:
    if x is None:
        return None
    if x.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32 and bfloat16, not {x.dtype}"
    if x.dim() != 4:
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the kernel takes channels_last; of other layouts PyTorch's own is fast"
    return "x is empty" if x.numel() == 0 else None


OPS["batch_norm"] = Op("batch_norm", "channels_last, two passes forward and two backward", _refuses)
