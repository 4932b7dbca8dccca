"""The output projection and its cross entropy, by chunks of rows: the logits exist for one chunk at a time.

N: rows, all dimensions of hidden but the last, multiplied. H: features. V: classes. z [rows, V]: a chunk's logits.

    z = h Wᵀ + b;   loss, z <- d loss / d z (in place);   dH = z W,   dW += zᵀ h,   db += Σ z

Two GEMMs a chunk with a frozen projection and three with a trained one, none of them a repetition: the gradient
is computed where the loss is, and the backward only hands it out. See `cross_entropy` for the loss itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops.cross_entropy import (
    Reduction,
    _checked_labels,
    check_class_weight,
    check_options,
    cross_entropy_reference,
    denominator,
    divided,
    refuses,
)
from fasttune.ops.library import LIBRARY, OPS, Op, has_kernel, record_use

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**29}
"""Logits a chunk has by default: small enough to matter little beside the model, large enough for the GEMMs."""
CHUNK_ROWS = {"cpu": 256, "cuda": 1024}
"""Fewer rows than these cost more in reading W again for each chunk than they save."""
TILE_ROWS = 2048
"""Rows of dW that are added to its sum at a time: what they take, 3 MB at H = 768, stays in cache."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    divisor: float | Tensor | None = None,
    shift: bool = False,
    return_lse: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy(hidden @ weight.T + bias, target, ...)` without the logits of more than a chunk of rows.

    hidden: [..., H], strided or not; float64, float32, float16 or bfloat16.
    weight: [V, H], the projection, of hidden's dtype, and bias: [V] or None, likewise. Each gets a gradient if it
        requires one; a weight tied to an embedding may. Under autocast all three are taken to its dtype first.
    target: [...], an integer dtype: classes in [0, V), or ignore_index.
    class_weight: [V] or None: what `cross_entropy` calls weight.
    ignore_index, label_smoothing, softcap, z_loss, reduction, divisor, return_lse: as in `cross_entropy`.
    shift: next-token prediction: target is [..., time], and position t is scored against target t + 1 of its own
        sequence. The last position is scored against nothing: loss 0, gradient 0, not counted by the mean.
    chunk_bytes: the size of the one buffer for logits; at least one row. By default 2**24 logits but at least
        256 rows on CPU, 2**29 and 1024 on CUDA; and all rows where that takes no more than the float32 sum of
        dW that it saves.

    The logits are rounded to hidden's dtype, as a linear layer would. Gradients of weight and bias are summed over
    chunks in float32. Rows that are ignored take part in no GEMM on CPU; on CUDA, where leaving them out would
    make the host wait for the device, they do. float64, and float16 on CPU, run a plain composition of PyTorch's
    ops, which makes all logits.

    The gradient for "mean" and "sum" is computed by the forward for an upstream gradient of 1, and scaled by the
    backward if that is something else. It is handed out once: a second backward (retain_graph) raises
    RuntimeError. For "none" it is computed by the backward, chunk by chunk with each row's upstream gradient, from
    logits computed again; a second backward gives equal gradients. Differentiating the backward raises
    NotImplementedError, except for float64.

    Returns as `cross_entropy` does: [] or [...] for "none", float32 (float64 for float64).

    Raises ValueError naming the argument at fault, TypeError for a wrong dtype, and IndexError naming the first
    row whose label is out of range, and the range.
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden, weight, bias, target, class_weight, shift, chunk_bytes)
    check_options(target, label_smoothing, softcap, z_loss, reduction, divisor)
    record_use("linear_cross_entropy", hidden, weight)
    lead, classes = target.shape, weight.shape[0]
    target = target.to(torch.int64)
    target = (shifted(target, ignore_index) if shift else target).reshape(-1)
    rows = hidden.reshape(lead.numel(), hidden.shape[-1])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    class_weight = None if class_weight is None else class_weight.to(wide)
    below = denominator(target, class_weight, ignore_index, classes, wide, reduction, divisor)
    options = (ignore_index, label_smoothing, softcap or 0.0, z_loss)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]

    if refuses(hidden) is not None:
        row, stats = cross_entropy_reference(F.linear(rows, weight, bias), target, class_weight, *options)
        loss = row.reshape(lead) if below is None else divided(row.sum(), below)
    elif below is None or not any(wanted):
        row, stats = torch.ops.fasttune.linear_cross_entropy_rows(
            rows, weight, bias, target, class_weight, *options, chunk_bytes
        )
        loss = row.reshape(lead) if below is None else divided(row.sum(), below)
    else:
        factor = divided(torch.ones_like(below), below)
        loss, stats, *_ = torch.ops.fasttune.linear_cross_entropy_grad(
            rows, weight, bias, target, factor, class_weight, *options, wanted, chunk_bytes
        )
    return (loss, stats.detach().sum(-1).reshape(lead)) if return_lse else loss


def shifted(target: Tensor, ignore_index: int) -> Tensor:
    """target [..., time] -> each position's next label, and ignore_index for the last one."""
    return F.pad(target[..., 1:], (0, 1), value=ignore_index) if target.shape[-1] > 0 else target


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    shift: bool,
    chunk_bytes: int | None,
) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point dtype, found {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape [V, H] with V >= 1, found {list(weight.shape)}")
    classes, features = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != features:
        raise ValueError(f"hidden: expected shape [..., {features}] to fit weight, found {list(hidden.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected hidden's dtype {hidden.dtype}, found {tensor.dtype}")
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"bias: expected shape [{classes}] to fit weight, found {list(bias.shape)}")
    if target.shape != hidden.shape[:-1]:
        expected = list(hidden.shape[:-1])
        raise ValueError(f"target: expected shape {expected} to fit hidden, found {list(target.shape)}")
    if shift and target.dim() == 0:
        raise ValueError("shift: expected target of shape [..., time], found []")
    if class_weight is not None:
        check_class_weight("class_weight", class_weight, classes)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected a number >= 1 or None, found {chunk_bytes}")


def chunk_rows(rows: int, weight: Tensor, wants_weight: bool, chunk_bytes: int | None) -> int:
    """How many rows a chunk has, at least one."""
    (classes, features), size = weight.shape, weight.element_size()
    if chunk_bytes is not None:
        return max(1, min(rows, chunk_bytes // (classes * size)))
    device = "cuda" if weight.is_cuda else "cpu"
    chunk = max(CHUNK_ROWS[device], CHUNK_ELEMENTS[device] // classes)
    if wants_weight and size < 4 and rows * size <= chunk * size + features * 4:
        return max(1, rows)
    return max(1, min(rows, chunk - chunk % 64))


def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    options = (class_weight, ignore_index, label_smoothing, softcap, z_loss)
    row, stats, *_ = _chunks(hidden, weight, bias, target, None, options, [False] * 3, chunk_bytes)
    return row, stats


def _grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    wanted: list[bool],
    chunk_bytes: int | None,
) -> tuple[Tensor, ...]:
    """factor, [] or [N]: what each row's gradient is multiplied by. Its loss too, before they are summed."""
    options = (class_weight, ignore_index, label_smoothing, softcap, z_loss)
    row, stats, *gradients = _chunks(hidden, weight, bias, target, factor, options, wanted, chunk_bytes)
    return (row.sum() * factor if factor.dim() == 0 else (row * factor).sum()), stats, *gradients


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    options: tuple,
    wanted: list[bool],
    chunk_bytes: int | None,
) -> tuple[Tensor, ...]:
    """The rows' losses [N] and statistics [N, 2], and the gradients that are wanted, or empty tensors.

    factor None: no gradient.
    """
    classes, every, ignore_index = weight.shape[0], target.shape[0], options[1]
    live = None
    if not (hidden.is_cuda and has_kernel("cross_entropy_grad_", "cuda")):
        _checked_labels(target, classes, ignore_index)
        live = (target != ignore_index).nonzero().squeeze(1)
        if live.numel() < every:
            hidden, target = hidden[live], target[live]
            factor = factor if factor is None or factor.dim() == 0 else factor[live]
        else:
            live = None
    rows = target.shape[0]
    chunk = chunk_rows(rows, weight, wanted[1], chunk_bytes)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    row, stats = hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, 2, dtype=wide)
    dh, dw, db = (hidden.new_empty(0) for _ in range(3))
    if wanted[0]:
        dh = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if wanted[1]:
        dw = weight.new_zeros(weight.shape) if rows == 0 else _room_for_sum(weight, chunked=chunk < rows)
    if wanted[2]:
        db = weight.new_zeros(classes, dtype=wide)

    room = hidden.new_empty(min(chunk, rows), classes)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        h, y, z = hidden[part], target[part], room[: part.stop - part.start]
        if bias is None:
            torch.mm(h, weight.t(), out=z)
        else:
            torch.addmm(bias, h, weight.t(), out=z)
        if factor is None:
            row[part], stats[part] = torch.ops.fasttune.cross_entropy_rows(z, y, *options)
            continue
        own = factor if factor.dim() == 0 else factor[part]
        row[part], stats[part] = torch.ops.fasttune.cross_entropy_grad_(z, y, own, *options)
        if wanted[0]:
            torch.mm(z, weight, out=dh[part])
        if wanted[1]:
            _add_product_(dw, z, h, first=start == 0)
        if wanted[2]:
            db += z.sum(0, dtype=wide)

    if live is not None:
        row, stats = _spread(row, live, every), _spread(stats, live, every)
        dh = _spread(dh, live, every) if wanted[0] else dh
    return row, stats, dh, dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


def _room_for_sum(weight: Tensor, chunked: bool) -> Tensor:
    """Uninitialised, [V, H]: for dW, in float32 where several chunks add to it (Liger-Kernel#512)."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if chunked else weight.dtype
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


def _add_product_(dw: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """dw [V, H] += dzᵀ [V, rows] h [rows, H], or = for the first."""
    if dw.dtype == dz.dtype:
        torch.mm(dz.t(), h, out=dw) if first else dw.addmm_(dz.t(), h)
    elif dw.is_cuda and first:
        torch.mm(dz.t(), h, out_dtype=dw.dtype, out=dw)
    elif dw.is_cuda:
        torch.addmm(dw, dz.t(), h, out_dtype=dw.dtype, out=dw)
    else:
        # PyTorch has no GEMM on CPU from 16 bits to float32. Each product is rounded once, and tile by tile
        # added while it is in the cache.
        room = dz.new_empty(min(TILE_ROWS, dw.shape[0]), dw.shape[1])
        for total, columns in zip(dw.split(TILE_ROWS), dz.split(TILE_ROWS, dim=1), strict=True):
            tile = torch.mm(columns.t(), h, out=room[: total.shape[0]])
            total.copy_(tile) if first else total.add_(tile)


def _spread(x: Tensor, live: Tensor, every: int) -> Tensor:
    return x.new_zeros(every, *x.shape[1:]).index_copy_(0, live, x)


_OPTIONS = "Tensor? class_weight, int ignore_index, float label_smoothing, float softcap, float z_loss"
LIBRARY.define(
    f"linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS},"
    " int? chunk_bytes) -> (Tensor loss, Tensor stats)"
)
LIBRARY.define(
    "linear_cross_entropy_grad(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor factor,"
    f" {_OPTIONS}, bool[] wanted, int? chunk_bytes)"
    " -> (Tensor loss, Tensor stats, Tensor dhidden, Tensor dweight, Tensor dbias)"
)
LIBRARY.impl("linear_cross_entropy_rows", _rows, "CompositeExplicitAutograd")
LIBRARY.impl("linear_cross_entropy_grad", _grad, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::linear_cross_entropy_rows", lib=LIBRARY)
def _(hidden, weight, bias, target, *options):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(target.shape, dtype=wide), hidden.new_empty(*target.shape, 2, dtype=wide)


@torch.library.register_fake("fasttune::linear_cross_entropy_grad", lib=LIBRARY)
def _(hidden, weight, bias, target, factor, *rest):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    wanted = rest[-2]
    dh, dw = (hidden.new_empty(x.shape if want else 0) for x, want in ((hidden, wanted[0]), (weight, wanted[1])))
    db = hidden.new_empty(weight.shape[0] if wanted[2] else 0)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(*target.shape, 2, dtype=wide), dh, dw, db


def _setup_rows(ctx, inputs, output) -> None:
    hidden, weight, bias, target, class_weight, *ctx.options, ctx.chunk_bytes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, bias, target, class_weight)


def _backward_rows(ctx, upstream: Tensor, _):
    _refuse_second_order()
    hidden, weight, bias, target, class_weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    _, _, *gradients = torch.ops.fasttune.linear_cross_entropy_grad(
        hidden, weight, bias, target, upstream, class_weight, *ctx.options, wanted, ctx.chunk_bytes
    )
    return *(grad if want else None for grad, want in zip(gradients, wanted, strict=True)), *(None,) * 7


def _setup_grad(ctx, inputs, output) -> None:
    _, stats, *gradients = output
    ctx.wanted = inputs[-2]
    # Not through save_for_backward: what that keeps alive could not be handed out without a copy of dW.
    ctx.gradients = gradients
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)


def _backward_grad(ctx, upstream: Tensor, *_):
    _refuse_second_order()
    if ctx.gradients is None:
        raise RuntimeError(
            "linear_cross_entropy: a second backward, but the first one handed out the gradients;"
            " reduction='none' computes them anew for each backward"
        )
    gradients, ctx.gradients = ctx.gradients, None
    given = (_scaled(grad, upstream) if want else None for grad, want in zip(gradients, ctx.wanted, strict=True))
    return *given, *(None,) * 9


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad · upstream, in grad itself; but a trace takes grad for an output of the forward, to be left alone."""
    if type(upstream) is not Tensor:
        return (grad * upstream).to(grad.dtype)
    torch.ops.fasttune.scale_(grad, upstream)
    return grad


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_cross_entropy can be differentiated once, not twice; in float64, more often"
        )


torch.library.register_autograd(
    "fasttune::linear_cross_entropy_rows", _backward_rows, setup_context=_setup_rows, lib=LIBRARY
)
torch.library.register_autograd(
    "fasttune::linear_cross_entropy_grad", _backward_grad, setup_context=_setup_grad, lib=LIBRARY
)
OPS["linear_cross_entropy"] = Op(
    "cross_entropy_grad_", "PyTorch's GEMMs around the compiled cross entropy, chunk by chunk", refuses
)
