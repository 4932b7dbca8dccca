"""Cross-entropy over a large vocabulary: the specification, in plain PyTorch.

rows: all dimensions of the logits but the last, multiplied. V: classes, the last dimension.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fasttune.ops.library import LIBRARY, OPS, Op

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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The negative log-likelihood of the target classes.

    logits: [..., V], strided or not, never written to; float64, float32, float16 or bfloat16. The arithmetic is
        float32 (float64 for float64), and the gradient is rounded to the logits' dtype once.
    target: [...], an integer dtype: classes in [0, V), or ignore_index.
    weight: [V] or None: a factor for each class.
    label_smoothing: in [0, 1]: the share of the target spread over all classes.
    softcap: c > 0 puts c · tanh(logits / c) in the logits' place (Gemma 2, arXiv:2408.00118).
    z_loss: a factor >= 0 for logsumexp², added to each row (PaLM, arXiv:2204.02311).
    reduction: "mean", "sum" or "none".
    divisor: the mean's denominator instead of the one below, a number or a tensor of one element: the global
        number of supervised tokens makes accumulation and data parallelism exact. Only for "mean".

    One row's loss, with ε the smoothing, y its target and w the weights (1 if None), is

        (1 - ε) w_y nll_y + ε/V Σ_c w_c nll_c + z_loss w_y lse²        nll_c = lse - logits_c

    and 0, with gradient 0, where the target is ignore_index. "mean" divides the sum by Σ w_y over the rows not
    ignored (torch's definition, also with smoothing), or by the divisor; where that is 0, as it is if all rows
    are ignored, loss and gradients are 0, not NaN. Options that `torch.nn.functional.cross_entropy` has mean
    the same there, except that the loss of 16-bit logits is float32 here.

    Returns the loss, float32 (float64 for float64), [] or [...] for "none"; with return_lse also logsumexp of
    the (capped) logits, [...], 0 in ignored rows, which carries no gradient.

    Raises ValueError naming the argument at fault, TypeError for a wrong dtype, and IndexError naming the first
    row whose label is out of range, and the range.
    """
    _check(logits, target, weight, label_smoothing, softcap, z_loss, reduction, divisor)
    classes = logits.shape[-1]
    target = target.to(torch.int64)
    safe = torch.ops.fasttune.checked_labels(target, classes, ignore_index)
    live = target != ignore_index

    # Ignored rows go first of all: what a padded position holds may be NaN, and 0 * NaN would be its gradient.
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = torch.where(live.unsqueeze(-1), logits.to(wide), 0.0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    # The gradient through the maximum cancels; without detach it would not do so bit by bit.
    top = z.detach().amax(-1, keepdim=True)
    shifted = z - top
    log_sum = shifted.exp().sum(-1).log()
    # Never lse - z_y: that rounds at the size of the logits, not at the size of the loss.
    nll = log_sum - shifted.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    lse = torch.where(live, top.squeeze(-1) + log_sum, 0.0)

    w = None if weight is None else weight.to(z.dtype)
    factor = torch.ones_like(nll) if w is None else w[safe]
    row = (1.0 - label_smoothing) * factor * nll
    if label_smoothing > 0:
        every = classes * log_sum - shifted.sum(-1) if w is None else w.sum() * log_sum - (shifted * w).sum(-1)
        row = row + label_smoothing / classes * every
    if z_loss > 0:
        row = row + z_loss * factor * lse.square()
    row = torch.where(live, row, 0.0)

    loss = _reduce(row, factor * live, reduction, divisor)
    return (loss, lse.detach()) if return_lse else loss


def _reduce(row: Tensor, factor: Tensor, reduction: Reduction, divisor: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return row
    total = row.sum()
    if reduction == "sum":
        return total
    below = factor.sum() if divisor is None else torch.as_tensor(divisor, dtype=row.dtype, device=row.device)
    below = below.reshape(())
    return torch.where(below == 0, 0.0, total / torch.where(below == 0, 1.0, below))


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
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: expected an integer dtype (classes, not probabilities), found {target.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, found {list(logits.shape)}")
    if target.shape != logits.shape[:-1]:
        expected = list(logits.shape[:-1])
        raise ValueError(f"target: expected shape {expected} to fit logits, found {list(target.shape)}")
    if weight is not None and tuple(weight.shape) != (logits.shape[-1],):
        raise ValueError(f"weight: expected shape [{logits.shape[-1]}], found {list(weight.shape)}")
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


LIBRARY.define("checked_labels(Tensor target, SymInt classes, SymInt ignore_index) -> Tensor")
LIBRARY.impl("checked_labels", _checked_labels, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::checked_labels", lib=LIBRARY)
def _(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    return torch.where(target != ignore_index, target, 0)


OPS["cross_entropy"] = Op(None, "plain PyTorch")
