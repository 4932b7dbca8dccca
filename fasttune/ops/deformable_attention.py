"""Attention to a few sampled points of several maps, without a tensor of the samples (Zhu et al., Deformable DETR,
2020, arXiv 2010.04159).

b: batch rows. q: queries. heads. d: width of a head. s: pixels of all levels' maps, level after level.
n: sampling points of a query and head over all levels, level after level.

With v_c the row value[b, pixel_c, head] of each of the four pixels c around location_i, for a query and head:

Forward    out = Σ_i weight_i Σ_c area_c v_c
Backward   dv_c += weight_i area_c dout,  dweight_i = Σ_c area_c <v_c, dout>,
           dlocation_i = weight_i Σ_c (area_c)' <v_c, dout>, the derivative by x and by y

Saved are value, locations and weights, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops.library import LIBRARY, OPS, Op, record_use

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_BILINEAR, _ZEROS = 0, 0  # modes of ATen's grid_sampler_2d


def deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    points: Sequence[int] | None = None,
) -> Tensor:
    """Sum of value's bilinear samples at the locations, each times its weight.

    value: [b, s, heads, d] with d of 1 or more; floating point, strided or not.
    shapes: (height, width) of each level; s is the sum of their products, a map's pixels row by row.
    locations: [b, q, heads, levels, points, 2], (x, y) with [0, 1] from edge to edge of the level's map, so that
        pixel i of w has its centre at (i + 0.5) / w; outside the map there are zeros.
    weights: [b, q, heads, levels, points]. Both floating point, of value's dtype or not.
    points: of each level, where levels have different numbers; then locations are [b, q, heads, n, 2] and weights
        [b, q, heads, n], level after level (RT-DETRv2, arXiv 2407.17140).

    Returns [b, q, heads * d], contiguous, in value's dtype. Everything is computed in float32 (float64 if one of
    the three is), under autocast too, and rounded once; a gradient has the dtype of its tensor. Locations in
    bfloat16 are as coarse as 2**-9: a quarter of a pixel among 128. At a pixel's centre, where the derivative by
    the location jumps, it is that of the right and lower side, as grid_sample's. Differentiating the backward
    raises NotImplementedError. Where one of the three is neither float32 nor bfloat16 the reference runs as it
    stands.

    Raises ValueError naming the argument, the shape or dtype expected and the one found.
    """
    sizes = [int(side) for shape in shapes for side in shape]
    if points is None:
        _check_levels(locations, weights, len(shapes))
        points = [locations.shape[4]] * len(shapes)
        locations, weights = locations.flatten(3, 4), weights.flatten(3)
    _check(value, shapes, locations, weights, points)
    record_use("deformable_attention", value)
    refused = _refuses(value, locations, weights)
    run = deformable_attention_reference if refused else torch.ops.fasttune.deformable_attention
    return run(value, sizes, list(points), locations, weights)


def _check_levels(locations: Tensor, weights: Tensor, levels: int) -> None:
    if locations.dim() != 6 or locations.shape[3] != levels:
        found = list(locations.shape)
        raise ValueError(f"locations: expected [b, q, heads, {levels}, points, 2] without points, found {found}")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"weights: expected {list(locations.shape[:-1])}, found {list(weights.shape)}")


def _check(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int]
) -> None:
    if value.dim() != 4 or value.shape[3] == 0 or not value.is_floating_point():
        found = f"{value.dtype} of shape {list(value.shape)}"
        raise ValueError(f"value: expected floating-point [b, s, heads, d] with d of 1 or more, found {found}")
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"shapes: expected (height, width) of one level or more, found {list(shapes)}")
    if sum(height * width for height, width in shapes) != value.shape[1]:
        raise ValueError(f"shapes: expected {value.shape[1]} pixels, value's, found {list(shapes)}")
    if len(points) != len(shapes) or min(points) < 0:
        raise ValueError(f"points: expected {len(shapes)} counts, one a level, found {list(points)}")
    b, _, heads, _ = value.shape
    n = sum(points)
    fits = locations.dim() == 5 and (locations.shape[0], *locations.shape[2:]) == (b, heads, n, 2)
    if not fits or not locations.is_floating_point():
        found = f"{locations.dtype} of shape {list(locations.shape)}"
        raise ValueError(f"locations: expected floating-point [{b}, q, {heads}, {n}, 2], found {found}")
    if weights.shape != locations.shape[:-1] or not weights.is_floating_point():
        found = f"{weights.dtype} of shape {list(weights.shape)}"
        raise ValueError(f"weights: expected floating-point {list(locations.shape[:-1])}, found {found}")
    for name, tensor in (("locations", locations), ("weights", weights)):
        if tensor.device != value.device:
            raise ValueError(f"{name}: expected value's device {value.device}, found {tensor.device}")


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _levels(
    value: Tensor, sizes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each level: its maps [b * heads, d, height, width], grid_sample's grids [b * heads, q, points, 2] and the
    weights [b * heads, 1, q, points], in the wide type."""
    b, _, heads, d = value.shape
    wide = _wide(value, locations, weights)
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    maps = value.to(wide).permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], dim=-1)
    grids = (2 * locations.to(wide) - 1).transpose(1, 2).flatten(0, 1).split(points, dim=-2)
    shares = weights.to(wide).transpose(1, 2).flatten(0, 1).unsqueeze(1).split(points, dim=-1)
    for (height, width), flat, grid, share in zip(shapes, maps, grids, shares, strict=True):
        yield flat.reshape(b * heads, d, height, width), grid, share


def _sampled(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def deformable_attention_reference(
    value: Tensor, sizes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """The specification: value [b, s, heads, d], sizes: height and width of each level, one after the other,
    locations [b, q, heads, n, 2], weights [b, q, heads, n] -> [b, q, heads * d]."""
    b, _, heads, d = value.shape
    q = locations.shape[1]
    wide = _wide(value, locations, weights)
    nothing = sum(tensor.flatten()[:0].sum(dtype=wide) for tensor in (value, locations, weights))  # for autograd
    out = value.new_zeros(b * heads, d, q, dtype=wide) + nothing
    if out.numel():  # grid_sample refuses what is empty
        for image, grid, share in _levels(value, sizes, points, locations, weights):
            out = out + (_sampled(image, grid) * share).sum(-1)
    return out.view(b, heads * d, q).transpose(1, 2).to(value.dtype).contiguous()


def deformable_attention_backward_reference(
    dout: Tensor, value: Tensor, sizes: list[int], points: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dout: [b, q, heads * d]. Returns the gradients of value, locations and weights, contiguous."""
    b, s, heads, d = value.shape
    q = locations.shape[1]
    wide = _wide(value, locations, weights)
    dmaps, dgrids, dshares = [], [], []
    if dout.numel() and sum(points):
        upstream = dout.to(wide).transpose(1, 2).reshape(b * heads, d, q, 1)
        for image, grid, share in _levels(value, sizes, points, locations, weights):
            dshares.append((_sampled(image, grid) * upstream).sum(1))
            dimage, dgrid = torch.ops.aten.grid_sampler_2d_backward(
                upstream * share, image, grid, _BILINEAR, _ZEROS, False, [True, True]
            )
            dmaps.append(dimage.flatten(2))
            dgrids.append(2 * dgrid)
        dvalue = torch.cat(dmaps, -1).view(b, heads, d, s).permute(0, 3, 1, 2)
        dlocations = torch.cat(dgrids, -2).view(b, heads, q, -1, 2).transpose(1, 2)
        dweights = torch.cat(dshares, -1).view(b, heads, q, -1).transpose(1, 2)
    else:
        dvalue, dlocations, dweights = (torch.zeros_like(of) for of in (value, locations, weights))
    gradients = ((dvalue, value), (dlocations, locations), (dweights, weights))
    dvalue, dlocations, dweights = (found.to(of.dtype).contiguous() for found, of in gradients)
    return dvalue, dlocations, dweights


LIBRARY.define(
    "deformable_attention(Tensor value, int[] sizes, int[] points, Tensor locations, Tensor weights) -> Tensor"
)
LIBRARY.define(
    "deformable_attention_backward(Tensor dout, Tensor value, int[] sizes, int[] points, Tensor locations,"
    " Tensor weights) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("deformable_attention", deformable_attention_reference, "CompositeExplicitAutograd")
LIBRARY.impl("deformable_attention_backward", deformable_attention_backward_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::deformable_attention", lib=LIBRARY)
def _(value, sizes, points, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("fasttune::deformable_attention_backward", lib=LIBRARY)
def _(dout, value, sizes, points, locations, weights):
    return tuple(of.new_empty(of.shape) for of in (value, locations, weights))


def _setup(ctx, inputs, output) -> None:
    value, ctx.sizes, ctx.points, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, dout: Tensor):
    value, locations, weights = ctx.saved_tensors
    dvalue, dlocations, dweights = torch.ops.fasttune.deformable_attention_backward(
        dout, value, ctx.sizes, ctx.points, locations, weights
    )
    return dvalue, None, None, dlocations, dweights


def _no_second_order(ctx, *grads):
    raise NotImplementedError("deformable_attention can be differentiated once, not twice")


torch.library.register_autograd("fasttune::deformable_attention", _backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("fasttune::deformable_attention_backward", _no_second_order, lib=LIBRARY)


def _refuses(*tensors: Tensor | None) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None} - {*KERNEL_DTYPES}
    if dtypes:
        return f"the kernel takes float32 and bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    return None


OPS["deformable_attention"] = Op(
    "deformable_attention",
    "each sample a few vectors of the compiled kernel, nothing of their size kept",
    _refuses,
)
