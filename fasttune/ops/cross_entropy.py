"""Cross-entropy over a large vocabulary: the specification in plain PyTorch, and the op around its kernels.

N: rows, all dimensions of the logits but the last, multiplied. V: classes, the last dimension.
z: the logits, capped if there is a cap. Each row keeps two numbers, its statistics: max(z) and
log_sum = log Σ exp(z - max), whose sum is the row's logsumexp.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttune.ops.library import LIBRARY, OPS, Op, record_use, warn_of_reference

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    divisor: float | Tensor | None = None,
    inplace: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The negative log-likelihood of the target classes.

    logits: [..., V], strided or not; float64, float32, float16 or bfloat16. The arithmetic is float32 (float64
        for float64), and the gradient is rounded to the logits' dtype once.
    target: [...], an integer dtype: classes in [0, V), or ignore_index.
    weight: [V] or None: a factor for each class, a constant.
    label_smoothing: in [0, 1]: the share of the target spread over all classes.
    softcap: c > 0 puts c · tanh(logits / c) in the logits' place (Gemma 2, arXiv:2408.00118).
    z_loss: a factor >= 0 for logsumexp², added to each row (PaLM, arXiv:2204.02311).
    reduction: "mean", "sum" or "none".
    divisor: the mean's denominator instead of the one below, a number or a tensor of one element: the global
        number of supervised tokens makes accumulation and data parallelism exact. Only for "mean".
    inplace: permits the gradient to be written over the logits, which then hold no logits any more: for "mean"
        and "sum" now, for "none" by the backward. Whoever saved them for a backward of his own gets autograd's
        error. The permission is not used where no gradient is wanted, in compiled code, for logits that are
        not rows of unit stride, or where `backend` says "reference" because of their dtype.

    One row's loss, with ε the smoothing, y its target and w the weights (1 if None), is

        (1 - ε) w_y nll_y + ε/V Σ_c w_c nll_c + z_loss w_y lse²        nll_c = lse - logits_c

    and 0, with gradient 0, where the target is ignore_index. "mean" divides the sum by Σ w_y over the rows not
    ignored (torch's definition, also with smoothing), or by the divisor; where that is 0, as it is if all rows
    are ignored, loss and gradients are 0, not NaN. Options that `torch.nn.functional.cross_entropy` has mean
    the same there, except that the loss of 16-bit logits is float32 here.

    Returns the loss, float32 (float64 for float64), [] or [...] for "none"; with return_lse also logsumexp of
    the (capped) logits, [...], 0 in ignored rows, which carries no gradient.

    A second backward (retain_graph) gives equal gradients; in place it raises, by autograd's own check, where the
    first one wrote to the logits: for "none", for an upstream gradient other than 1, and always on CUDA, where
    the host cannot know. Differentiating the backward raises NotImplementedError, except for float64.

    Raises ValueError naming the argument at fault, TypeError for a wrong dtype, and IndexError naming the first
    row whose label is out of range, and the range.
    """
    _check(logits, target, weight, label_smoothing, softcap, z_loss, reduction, divisor)
    record_use("cross_entropy", logits)
    lead = target.shape
    target = target.to(torch.int64).reshape(-1)
    flat = logits.reshape(lead.numel(), logits.shape[-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    below = denominator(target, weight, ignore_index, logits.shape[-1], wide, reduction, divisor)
    options = (ignore_index, label_smoothing, softcap or 0.0, z_loss)
    if refuses(logits) is not None:
        row, stats = cross_entropy_reference(flat, target, weight, *options)
        loss = row.reshape(lead) if below is None else divided(row.sum(), below)
    elif inplace and _may_overwrite(logits, flat):
        loss, stats = _InPlace.apply(flat, target, below, weight, options)
        loss = loss.reshape(lead) if below is None else loss
    else:
        row, stats = torch.ops.fasttune.cross_entropy_rows(flat, target, weight, *options)
        loss = row.reshape(lead) if below is None else divided(row.sum(), below)
    return (loss, stats.detach().sum(-1).reshape(lead)) if return_lse else loss


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """The specification: logits [N, V], target [N] -> the rows' losses [N] and statistics [N, 2], differentiable.

    softcap 0 is none. Float32, or float64 for float64.
    """
    classes = logits.shape[-1]
    safe = torch.ops.fasttune.checked_labels(target, classes, ignore_index)
    live = target != ignore_index
    z = _capped(logits, live, softcap)
    # The gradient through the maximum cancels; without detach it would not do so bit by bit.
    top = z.detach().amax(-1, keepdim=True)
    shifted = z - top
    log_sum = shifted.exp().sum(-1).log()
    # Never lse - z_y: that rounds at the size of the logits, not at the size of the loss.
    nll = log_sum - shifted.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    stats = torch.where(live.unsqueeze(-1), torch.stack((top.squeeze(-1), log_sum), -1), 0.0)

    w = None if weight is None else weight.to(z.dtype)
    factor = torch.ones_like(nll) if w is None else w[safe]
    row = (1.0 - label_smoothing) * factor * nll
    if label_smoothing > 0:
        every = classes * log_sum - shifted.sum(-1) if w is None else w.sum() * log_sum - (shifted * w).sum(-1)
        row = row + label_smoothing / classes * every
    if z_loss > 0:
        row = row + z_loss * factor * stats.sum(-1).square()
    return torch.where(live, row, 0.0), stats


def cross_entropy_gradient_reference(
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """The specification's derivative, written out: factor · d row / d logits, [N, V] in the logits' dtype.

    factor: one element or [N]: the upstream gradient of each row, folded in before the one rounding.
    """
    classes = logits.shape[-1]
    safe = _checked_labels(target, classes, ignore_index)
    live = target != ignore_index
    z = _capped(logits, live, softcap)
    w = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    of_all = w[safe] * (1.0 - label_smoothing) + label_smoothing / classes * w.sum()
    of_all = of_all + 2.0 * z_loss * w[safe] * stats.sum(-1)
    grad = (z - stats[:, :1] - stats[:, 1:]).exp_() * of_all.unsqueeze(-1)
    grad -= label_smoothing / classes * w
    # From p - 1 in the arithmetic's type: p rounded to 16 bits first is wrong by 20 % at p = 0.99.
    grad.scatter_add_(-1, safe.unsqueeze(-1), ((label_smoothing - 1.0) * w[safe]).unsqueeze(-1))
    if softcap > 0:
        grad *= 1.0 - (z / softcap).square()
    return torch.where(live.unsqueeze(-1), grad * factor.reshape(-1, 1), 0.0).to(logits.dtype)


def _capped(logits: Tensor, live: Tensor, softcap: float) -> Tensor:
    # Ignored rows go first of all: what a padded position holds may be NaN, and 0 * NaN would be its gradient.
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = torch.where(live.unsqueeze(-1), logits.to(wide), 0.0)
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def denominator(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    classes: int,
    dtype: torch.dtype,
    reduction: Reduction,
    divisor: float | Tensor | None,
) -> Tensor | None:
    """What the sum of the rows' losses is divided by, [] of dtype; None for "none"."""
    if reduction == "none":
        return None
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=target.device)
    if isinstance(divisor, Tensor):
        return divisor.detach().to(target.device, dtype).reshape(())
    if divisor is not None:
        return torch.full((), divisor, dtype=dtype, device=target.device)
    live = target != ignore_index
    if weight is None:
        return live.sum(dtype=dtype)
    # A label out of range is reported by the rows' op; here it must only do no harm.
    return (weight[torch.where(live, target, 0).clamp(0, classes - 1)] * live).sum()


def divided(total: Tensor, below: Tensor) -> Tensor:
    """total / below, or 0 where below is 0: no row is supervised."""
    return torch.where(below == 0, 0.0, total / torch.where(below == 0, 1.0, below))


def _may_overwrite(logits: Tensor, flat: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    if (logits if logits._base is None else logits._base).is_leaf:
        raise ValueError(
            "inplace: expected logits that another op computed, found a leaf that requires a gradient"
        )
    is_view = flat.data_ptr() == logits.data_ptr()
    return is_view and flat.stride(1) == 1 and (flat.shape[0] < 2 or flat.stride(0) >= flat.shape[1])


class _InPlace(torch.autograd.Function):
    """Σ row losses / below, with the gradient written over the logits by the forward, upstream taken as 1.

    Below None: the rows' losses. Their gradient waits for the upstream gradients, so for the backward.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, below: Tensor | None, weight: Tensor | None, options):
        if below is None:
            loss, stats = torch.ops.fasttune.cross_entropy_rows(logits.detach(), target, weight, *options)
            ctx.save_for_backward(logits, target, weight)
        else:
            factor = divided(torch.ones_like(below), below)
            row, stats = torch.ops.fasttune.cross_entropy_grad_(logits.detach(), target, factor, weight, *options)
            torch.autograd.graph.increment_version(logits)
            loss = divided(row.sum(), below)
            ctx.save_for_backward(logits)
        ctx.deferred, ctx.options = below is None, options
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _):
        logits = ctx.saved_tensors[0]
        grad = logits.detach()
        if ctx.deferred:
            _, target, weight = ctx.saved_tensors
            torch.ops.fasttune.cross_entropy_grad_(grad, target, upstream, weight, *ctx.options)
            changed = True
        else:
            changed = scale_gradient_(grad, upstream)
        if changed:
            # A second backward would find its own result in the logits' place: autograd shall raise instead.
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None


def scale_gradient_(grad: Tensor, upstream: Tensor) -> bool:
    """grad *= upstream, []; whether grad may have changed, which on CPU it has not where upstream is 1."""
    torch.ops.fasttune.scale_(grad, upstream)
    return not upstream.is_cpu or upstream.item() != 1


def _scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, []. A kernel looks at the factor on the device, and leaves x alone where it is 1."""
    if not factor.is_cpu or factor.item() != 1:
        x.mul_(factor)


def _check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    divisor: float | Tensor | None,
) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point dtype, found {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, found {list(logits.shape)}")
    if target.shape != logits.shape[:-1]:
        expected = list(logits.shape[:-1])
        raise ValueError(f"target: expected shape {expected} to fit logits, found {list(target.shape)}")
    if weight is not None:
        check_class_weight("weight", weight, logits.shape[-1])
    check_options(target, label_smoothing, softcap, z_loss, reduction, divisor)


def check_class_weight(name: str, weight: Tensor, classes: int) -> None:
    if tuple(weight.shape) != (classes,):
        raise ValueError(f"{name}: expected shape [{classes}], found {list(weight.shape)}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(f"{name}: expected a constant, found a tensor that requires a gradient")


def check_options(
    target: Tensor,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    divisor: float | Tensor | None,
) -> None:
    """Raises what `cross_entropy` documents for the arguments that `linear_cross_entropy` takes too."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: expected an integer dtype (classes, not probabilities), found {target.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], found {label_smoothing}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a number > 0 or None, found {softcap}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a number >= 0, found {z_loss}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', found {reduction!r}")
    if divisor is None:
        return
    if reduction != "mean":
        raise ValueError(f"divisor: expected None with reduction {reduction!r}, found {divisor}")
    if isinstance(divisor, Tensor):
        if divisor.numel() != 1:
            raise ValueError(f"divisor: expected one element, found shape {list(divisor.shape)}")
    elif not 0 <= divisor < math.inf:
        raise ValueError(f"divisor: expected a number >= 0, found {divisor}")


# An op of its own, so that compiled code checks too: the check depends on data.
def _checked_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """target [...] with 0 in the place of ignore_index; IndexError for a label out of [0, classes)."""
    live = target != ignore_index
    bad = (live & ((target < 0) | (target >= classes))).flatten()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target: label {int(target.flatten()[row])} in row {row} is out of range:"
            f" expected [0, {classes}) or ignore_index {ignore_index}"
        )
    return torch.where(live, target, 0)


def _rows(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    warn_of_reference("cross_entropy", logits)
    return cross_entropy_reference(logits, *args)


def _grad_(
    logits: Tensor, target: Tensor, factor: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    row, stats = _rows(logits, target, weight, *options)
    logits.copy_(cross_entropy_gradient_reference(logits, target, stats, factor, weight, *options))
    return row, stats


_OPTIONS = "Tensor? weight, int ignore_index, float label_smoothing, float softcap, float z_loss"
LIBRARY.define("checked_labels(Tensor target, SymInt classes, SymInt ignore_index) -> Tensor")
LIBRARY.define("scale_(Tensor(a!) x, Tensor factor) -> ()")
LIBRARY.define(f"cross_entropy_rows(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor loss, Tensor stats)")
LIBRARY.define(
    f"cross_entropy_rows_backward(Tensor logits, Tensor target, Tensor stats, Tensor factor, {_OPTIONS}) -> Tensor"
)
LIBRARY.define(
    f"cross_entropy_grad_(Tensor(a!) logits, Tensor target, Tensor factor, {_OPTIONS})"
    " -> (Tensor loss, Tensor stats)"
)
LIBRARY.impl("checked_labels", _checked_labels, "CompositeExplicitAutograd")
LIBRARY.impl("scale_", _scale_, "CompositeExplicitAutograd")
LIBRARY.impl("cross_entropy_rows", _rows, "CompositeExplicitAutograd")
LIBRARY.impl("cross_entropy_rows_backward", cross_entropy_gradient_reference, "CompositeExplicitAutograd")
LIBRARY.impl("cross_entropy_grad_", _grad_, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::checked_labels", lib=LIBRARY)
def _(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    return torch.where(target != ignore_index, target, 0)


@torch.library.register_fake("fasttune::scale_", lib=LIBRARY)
def _(x: Tensor, factor: Tensor) -> None:
    return None


@torch.library.register_fake("fasttune::cross_entropy_rows", lib=LIBRARY)
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[0], dtype=wide), logits.new_empty(logits.shape[0], 2, dtype=wide)


@torch.library.register_fake("fasttune::cross_entropy_grad_", lib=LIBRARY)
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[0], dtype=wide), logits.new_empty(logits.shape[0], 2, dtype=wide)


@torch.library.register_fake("fasttune::cross_entropy_rows_backward", lib=LIBRARY)
def _(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:
    logits, target, weight, *ctx.options = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(logits, target, stats, weight)


def _backward(ctx, upstream: Tensor, _):
    logits, target, stats, weight = ctx.saved_tensors
    backward = torch.ops.fasttune.cross_entropy_rows_backward
    return backward(logits, target, stats, upstream, weight, *ctx.options), *(None,) * 6


def no_second_order(ctx, *grads):
    raise NotImplementedError("the cross entropy can be differentiated once, not twice; in float64, more often")


torch.library.register_autograd("fasttune::cross_entropy_rows", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("fasttune::cross_entropy_rows_backward", no_second_order, lib=LIBRARY)


def refuses(logits: Tensor | None = None, *others: Tensor | None) -> str | None:
    if logits is None or logits.dtype in (torch.float32, torch.bfloat16):
        return None
    if logits.dtype == torch.float16 and logits.is_cuda:
        return None
    return f"the kernels of cross_entropy do not take {logits.dtype} on {logits.device.type}"


OPS["cross_entropy"] = Op("cross_entropy_rows", "loss and gradient by the compiled kernel", refuses)
