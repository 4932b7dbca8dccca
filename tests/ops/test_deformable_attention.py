"""Deformable attention: numbers, against float64 and against transformers' own forms."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.d_fine.modeling_d_fine import multi_scale_deformable_attention_v2
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from fasttune.ops import backend, deformable_attention, library
from fasttune.ops.deformable_attention import (
    deformable_attention_backward_reference,
    deformable_attention_reference,
)

KERNEL = backend("deformable_attention", torch.empty(0))
needs_kernel = pytest.mark.skipif(KERNEL.name == "reference", reason=f"no kernel: {KERNEL.why}")
F32, BF16 = torch.float32, torch.bfloat16
# b, q, heads, d, shapes, points. The kernel pads d to a multiple of 16 and takes 32 channels at a time, a vector
# of points (16, 8 or 4), and 32 queries.
SIZES = [
    (1, 1, 1, 1, [(1, 1)], [1]),
    (2, 7, 3, 5, [(5, 7), (3, 2)], [2, 2]),
    (2, 33, 4, 32, [(16, 12), (8, 6), (4, 3)], [4, 4, 4]),
    (1, 65, 2, 48, [(9, 1), (1, 13)], [3, 6]),
    (3, 13, 2, 14, [(6, 5), (3, 3), (2, 1)], [1, 0, 4]),
    (2, 40, 1, 80, [(7, 9)], [17]),
    (1, 5, 8, 16, [(20, 30), (10, 15), (5, 8), (3, 4)], [4, 4, 4, 4]),
]
EVEN = SIZES[2]
# Relative to the truth, in norm: about a tenth of what one rounding to the dtype costs. Locations are known to
# half a unit of 2 x - 1, in float32 2**-25, times up to 30 pixels and the slope between two of them.
EPSILON = {torch.float64: 1e-13, F32: 3e-6, BF16: 1e-3}
ROUNDING = {torch.float64: 1e-13, F32: 3e-6, BF16: 2**-8}


def make(b, q, heads, d, shapes, points, dtype=F32, sampling=None, spread=0.7):
    """value [b, s, heads, d], locations [b, q, heads, n, 2] in and around the maps, weights [b, q, heads, n], all
    wanting gradients. No location is near a pixel's centre, where its derivative jumps."""
    generator = torch.Generator().manual_seed(b + 10 * q + 100 * d)
    sampling = sampling or dtype
    value = torch.randn(b, sum(h * w for h, w in shapes), heads, d, generator=generator, dtype=torch.float64)
    parts = []
    for (height, width), count in zip(shapes, points, strict=True):
        around = (torch.rand(b, q, heads, count, 2, generator=generator, dtype=torch.float64) - 0.5) * 2 * spread
        pixels = (around + 0.5) * torch.tensor([width, height]) - 0.5
        off = pixels - pixels.floor()
        parts.append((pixels + (0.2 + 0.6 * off - off) + 0.5) / torch.tensor([width, height]))
    weights = torch.randn(b, q, heads, sum(points), generator=generator, dtype=torch.float64).softmax(-1)
    tensors = value.to(dtype), torch.cat(parts, -2).to(sampling), weights.to(sampling)
    return [tensor.requires_grad_() for tensor in tensors]


def exact(value, shapes, points, locations, weights):
    """Pixel by pixel: each has the share (1 - |x - i|) (1 - |y - j|) of a sample, where both are positive."""
    out = 0
    firsts = torch.tensor([0, *(h * w for h, w in shapes)]).cumsum(0)
    parts = zip(shapes, firsts, locations.split(points, -2), weights.split(points, -1), strict=False)
    for (height, width), first, at, share in parts:
        columns, rows = torch.arange(width), torch.arange(height)
        wide = (1 - (at[..., :1] * width - 0.5 - columns).abs()).clamp(min=0)  # [b, q, heads, points, width]
        high = (1 - (at[..., 1:] * height - 0.5 - rows).abs()).clamp(min=0)
        image = value[:, first : first + height * width].unflatten(1, (height, width))
        out = out + torch.einsum("bqnpx,bqnpy,bqnp,byxnd->bqnd", wide, high, share, image)
    return out.flatten(2)


def run(value, shapes, points, locations, weights):
    return deformable_attention(value, shapes, locations, weights, points=points)


def with_grads(function, inputs, upstream, shapes, points):
    value, locations, weights = inputs
    out = function(value, shapes, points, locations, weights)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def upstream_of(size, dtype=torch.float64):
    b, q, heads, d, *_ = size
    return torch.randn(b, q, heads * d, generator=torch.Generator().manual_seed(2)).to(dtype)


def double(inputs):
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def assert_close_to_truth(size, inputs):
    *_, shapes, points = size
    dtype = inputs[0].dtype
    upstream = upstream_of(size, dtype)
    truth = with_grads(exact, double(inputs), upstream, shapes, points)
    ours = with_grads(run, inputs, upstream, shapes, points)
    for mine, right, of in zip(ours, truth, (inputs[0], *inputs), strict=True):
        assert mine.dtype == of.dtype
        assert mine.shape == right.shape
        assert (mine.double() - right).norm() <= ROUNDING[of.dtype] * right.norm()
    assert ours[0].is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "sampling"), [(torch.float64,) * 2, (F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16)]
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, dtype, sampling):
    assert_close_to_truth(size, make(*size, dtype=dtype, sampling=sampling))


@pytest.mark.parametrize("spread", [0.0, 3.0, 1e4])
def test_locations_in_the_middle_and_far_outside(spread):
    inputs = make(*EVEN, spread=spread)
    assert_close_to_truth(EVEN, inputs)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_is_at_most_that_of_grid_sample(size, dtype):
    """transformers' form in the same dtype: in bfloat16 it rounds every sample, and torch 2.13's grid_sample gives
    NaN now and then, not in every run, where locations are outside the maps."""
    *_, shapes, points = size
    inputs = make(*size, dtype=dtype)
    upstream = upstream_of(size, dtype)
    truth = with_grads(exact, double(inputs), upstream, shapes, points)
    ours, theirs = (with_grads(form, inputs, upstream, shapes, points) for form in (run, of_d_fine))
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        allowed = (other.double() - right).norm() + EPSILON[dtype] * right.norm()
        if dtype == BF16 and allowed.isnan():
            continue
        assert (mine.double() - right).norm() <= allowed


def of_d_fine(value, shapes, points, locations, weights):
    return multi_scale_deformable_attention_v2(value, shapes, locations, weights, points)


def of_deformable_detr(value, shapes, points, locations, weights):
    levels = (len(points), points[0])
    locations, weights = locations.unflatten(3, levels), weights.unflatten(3, levels)
    module = MultiScaleDeformableAttention()
    return module(value, torch.tensor(shapes), shapes, None, locations, weights, 64)


def of_mask2former(value, shapes, points, locations, weights):
    levels = (len(points), points[0])
    return multi_scale_deformable_attention(
        value, shapes, locations.unflatten(3, levels), weights.unflatten(3, levels)
    )


@pytest.mark.parametrize("theirs", [of_d_fine, of_deformable_detr, of_mask2former])
@pytest.mark.parametrize("size", [SIZES[1], SIZES[2], SIZES[6]], ids=str)
def test_equal_to_transformers_forms(size, theirs):
    *_, shapes, points = size
    inputs = make(*size)
    upstream = upstream_of(size, F32)
    pairs = zip(
        with_grads(run, inputs, upstream, shapes, points),
        with_grads(theirs, inputs, upstream, shapes, points),
        strict=True,
    )
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (64, 48), (13, 100), (19, 67)], ids=str)
def test_at_pixel_centres_the_derivative_is_of_grid_samples_side(shape):
    """There the derivative by the location jumps, and encoders sample just there."""
    height, width = shape
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    locations = torch.stack([x, y], -1).view(1, -1, 1, 1, 2).requires_grad_()
    value = torch.randn(1, height * width, 1, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = [value, locations, torch.ones(1, height * width, 1, 1, requires_grad=True)]
    upstream = upstream_of((1, height * width, 1, 16), F32)
    ours, theirs = (with_grads(form, inputs, upstream, [shape], [1]) for form in (run, of_d_fine))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_reference_is_the_kernels_equal(dtype):
    for size in SIZES:
        *_, shapes, points = size
        inputs = make(*size, dtype=dtype)
        sizes = [side for shape in shapes for side in shape]
        upstream = upstream_of(size, dtype)
        ours = with_grads(run, inputs, upstream, shapes, points)
        value, locations, weights = (tensor.detach() for tensor in inputs)
        theirs = (
            deformable_attention_reference(value, sizes, points, locations, weights),
            *deformable_attention_backward_reference(upstream, value, sizes, points, locations, weights),
        )
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine.double() - other.double()).norm() <= ROUNDING[dtype] * other.double().norm()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward_formulas_are_the_derivative_of_the_reference(size):
    *_, shapes, points = size
    inputs = make(*size, dtype=torch.float64)
    sizes = [side for shape in shapes for side in shape]
    upstream = upstream_of(size)
    value, locations, weights = inputs
    out = deformable_attention_reference(value, sizes, points, locations, weights)
    expected = torch.autograd.grad(out, inputs, upstream)
    with torch.no_grad():
        found = deformable_attention_backward_reference(upstream, value, sizes, points, locations, weights)
    for mine, derivative in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, derivative, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_the_reference():
    *_, shapes, points = SIZES[1]
    inputs = make(*SIZES[1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, at, w: run(v, shapes, points, at, w), inputs)


def test_float16_goes_by_the_reference():
    *_, shapes, points = EVEN
    inputs = make(*EVEN, dtype=torch.float16)
    out = run(inputs[0], shapes, points, *inputs[1:])
    right = exact(*double(inputs[:1]), shapes, points, *double(inputs[1:]))
    assert out.dtype == torch.float16
    assert (out.double() - right).norm() <= 2**-10 * right.norm()


@pytest.mark.parametrize("size", [(0, 7, 2, 8), (2, 0, 2, 8), (2, 7, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16])
def test_empty_batch_no_queries_no_heads(size, dtype):
    size = (*size, [(3, 4), (2, 2)], [2, 1])
    *_, shapes, points = size
    out, *gradients = with_grads(run, make(*size, dtype=dtype), upstream_of(size), shapes, points)
    b, q, heads, d = size[:4]
    assert out.shape == (b, q, heads * d)
    assert not any(gradient.any() for gradient in gradients)


def test_levels_without_points():
    size = (2, 7, 2, 8, [(3, 4)], [0])
    out, *gradients = with_grads(run, make(*size), upstream_of(size), [(3, 4)], [0])
    assert not out.any()
    assert gradients[0].shape == (2, 12, 2, 8)
    assert not gradients[0].any()


def layouts(value, locations, weights):
    """The same values by other strides."""
    yield [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (value, locations, weights)]
    yield [torch.stack((tensor, tensor), -1)[..., 0] for tensor in (value, locations, weights)]
    yield [tensor[:1].expand_as(tensor) for tensor in (value, locations, weights)]
    yield [torch.cat((value, value), -1)[..., : value.shape[-1]], locations, weights]
    yield [value[:, :, :1].expand_as(value), locations, weights]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [SIZES[2], SIZES[4]], ids=str)
def test_strides_change_nothing(size, dtype):
    *_, shapes, points = size
    inputs = [tensor.detach() for tensor in make(*size, dtype=dtype)]
    upstream = upstream_of(size, dtype)
    for strided in layouts(*inputs):
        results = []
        for form in (strided, [tensor.contiguous() for tensor in strided]):
            leaves = [tensor.detach().requires_grad_() for tensor in form]
            results.append(with_grads(run, leaves, upstream, shapes, points))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_upstream_gradients_of_any_stride(dtype):
    b, q, heads, d, shapes, points = EVEN
    inputs = make(*EVEN, dtype=dtype)
    out = run(inputs[0], shapes, points, *inputs[1:])
    for upstream in (
        torch.randn(b, heads * d, q).to(dtype).transpose(1, 2),
        torch.randn(b, q, 2 * heads * d).to(dtype)[..., ::2],
        torch.randn(q, heads * d).to(dtype).expand(b, q, heads * d),
        torch.ones((), dtype=dtype).expand(b, q, heads * d),
    ):
        found = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, upstream.contiguous(), retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_not_finite_stays_where_it_is(dtype):
    """A pixel's NaN reaches the queries that sample it, a location's its own query."""
    *_, shapes, points = EVEN
    value, locations, weights = (tensor.detach().clone() for tensor in make(*EVEN, dtype=dtype))
    clean = run(value, shapes, points, locations, weights)
    value[:, 17] = torch.nan
    locations[0, 3, 1, 2, 0] = torch.nan
    locations[0, 4, 1, 2, 1] = torch.inf
    ours, theirs = (form(value, shapes, points, locations, weights) for form in (run, of_d_fine))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], clean[~ours.isnan()])
    assert 0 < ours.isnan().sum() < ours.numel() / 2
    huge = torch.full_like(locations, 1e30)
    assert not run(clean.new_ones(value.shape), shapes, points, huge, weights).any()


@needs_kernel
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bits_repeat_and_do_not_depend_on_the_threads(dtype):
    before = torch.get_num_threads()
    *_, shapes, points = EVEN
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(with_grads(run, make(*EVEN, dtype=dtype), upstream_of(EVEN), shapes, points))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


# Numbers by integers: torch.randn gives others on another instruction set.
EVERYTHING = """
import sys, torch
import fasttune.ops

def numbers(*shape, by, low=-2.0, high=2.0):
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * by) % 2003 / 2003 * (high - low) + low).view(shape)

results = [fasttune.ops.build_info()["cpu"]]
for dtype, d in ((torch.float32, 32), (torch.bfloat16, 32), (torch.float32, 48), (torch.bfloat16, 13)):
    inputs = [numbers(2, 117, 3, d, by=7919).to(dtype).requires_grad_(),
              numbers(2, 41, 3, 5, 2, by=104729, low=-0.2, high=1.2).requires_grad_(),
              numbers(2, 41, 3, 5, by=1299709, low=0.0, high=1.0).requires_grad_()]
    out = fasttune.ops.deformable_attention(inputs[0], [(9, 11), (6, 3)], *inputs[1:], points=[3, 2])
    results += [out.detach(), *torch.autograd.grad(out, inputs, numbers(*out.shape, by=15485863).to(dtype))]
torch.save(results, sys.argv[1])
"""


@needs_kernel
def test_every_instruction_set_gives_the_same_but_for_rounding(tmp_path):
    """Multiplies and adds are fused where that exists."""
    sets = []
    for name in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": name}
        subprocess.run([sys.executable, "-c", EVERYTHING, tmp_path / name], env=environment, check=True)
        sets.append(torch.load(tmp_path / name))
    first, *others = sets
    assert first[0] == "default"
    for other in others:
        for one, two in zip(first[1:], other[1:], strict=True):
            assert (one.double() - two).norm() <= (3e-6 if one.dtype == F32 else 1e-3) * one.norm()


def test_second_backward_is_equal_and_second_order_is_refused():
    *_, shapes, points = EVEN
    inputs = make(*EVEN)
    out = run(inputs[0], shapes, points, *inputs[1:])
    upstream = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    gradient, *_ = torch.autograd.grad(out, inputs, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        gradient.sum().backward()


def test_only_some_inputs_want_gradients():
    *_, shapes, points = EVEN
    every = make(*EVEN)
    expected = torch.autograd.grad(run(every[0], shapes, points, *every[1:]).sum(), every)
    for i in range(3):
        inputs = [tensor if j == i else tensor.detach() for j, tensor in enumerate(every)]
        (found,) = torch.autograd.grad(run(inputs[0], shapes, points, *inputs[1:]).sum(), inputs[i])
        assert torch.equal(found, expected[i])


@needs_kernel
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_but_the_inputs_is_saved(dtype):
    *_, shapes, points = EVEN
    inputs = make(*EVEN, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(inputs[0], shapes, points, *inputs[1:])
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in inputs}


def test_checkpointing():
    *_, shapes, points = EVEN
    inputs = make(*EVEN)

    def block(value, locations, weights):
        return run(value.tanh(), shapes, points, locations, weights).square().sum()

    expected = torch.autograd.grad(block(*inputs), inputs)
    found = torch.autograd.grad(checkpoint(block, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(compiler):
    *_, shapes, points = SIZES[1]
    inputs = make(*SIZES[1])

    def step(value, locations, weights):
        return run(value * 1.5, shapes, points, locations, weights).square().sum()

    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        results = [
            (loss := function(*inputs), *torch.autograd.grad(loss, inputs)) for function in (step, compiled)
        ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(dtype):
    *_, shapes, points = SIZES[1]
    value, locations, weights = make(*SIZES[1], dtype=dtype, sampling=F32)
    sizes = [side for shape in shapes for side in shape]
    turned = value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    forward, backward = (
        torch.ops.fasttune.deformable_attention,
        torch.ops.fasttune.deformable_attention_backward,
    )
    torch.library.opcheck(forward, (value, sizes, points, locations, weights))
    torch.library.opcheck(forward, (turned, sizes, points, locations, weights))
    dout = upstream_of(SIZES[1], dtype)
    detached = [tensor.detach() for tensor in (value, locations, weights)]
    torch.library.opcheck(backward, (dout, detached[0], sizes, points, *detached[1:]))


def test_autocast_leaves_everything_as_it_is():
    *_, shapes, points = EVEN
    for dtype in (F32, BF16):
        inputs = make(*EVEN, dtype=dtype, sampling=F32)
        upstream = upstream_of(EVEN, dtype)
        expected = with_grads(run, inputs, upstream, shapes, points)
        with torch.autocast("cpu", BF16):
            found = with_grads(run, inputs, upstream, shapes, points)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_backend_tells_the_truth():
    name = "cpu" if library._C is not None else "reference"
    assert backend("deformable_attention", torch.ones(1), torch.ones(1, dtype=BF16)).name == name
    refused = backend("deformable_attention", torch.ones(1, dtype=BF16), torch.ones(1).double())
    assert refused.name == "reference"
    if library._C is not None:
        assert refused.why == "the kernel takes float32 and bfloat16, not torch.float64"


VALUE, AT, BY = torch.ones(2, 10, 3, 4), torch.ones(2, 7, 3, 2, 5, 2), torch.ones(2, 7, 3, 2, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": VALUE[0]}, r"^value: expected floating-point \[b, s, heads, d\] .*, found .* \[10, 3, 4\]"),
        ({"value": VALUE.int()}, r"^value: expected floating-point .*, found torch.int32"),
        ({"value": VALUE[..., :0]}, r"^value: expected .* d of 1 or more, found .* \[2, 10, 3, 0\]"),
        ({"shapes": [(2, 3), (2, 1)]}, r"^shapes: expected 10 pixels, value's, found \[\(2, 3\), \(2, 1\)\]"),
        (
            {"shapes": [(2, 5)]},
            r"^locations: expected \[b, q, heads, 1, points, 2\] .*, found \[2, 7, 3, 2, 5, 2\]",
        ),
        ({"shapes": [(-2, -3), (2, 2)]}, r"^shapes: expected \(height, width\) of one level or more, found"),
        ({"locations": AT[:1]}, r"^weights: expected \[1, 7, 3, 2, 5\], found \[2, 7, 3, 2, 5\]"),
        ({"locations": AT[..., :1]}, r"^locations: expected floating-point \[2, q, 3, 10, 2\], found"),
        ({"locations": AT.int()}, r"^locations: expected floating-point .*, found torch.int32"),
        ({"weights": BY[..., :4]}, r"^weights: expected \[2, 7, 3, 2, 5\], found \[2, 7, 3, 2, 4\]"),
        ({"weights": BY.int()}, r"^weights: expected floating-point .*, found torch.int32"),
        (
            {"locations": AT.flatten(3, 4), "weights": BY.flatten(3), "points": [5, 4]},
            r"^locations: expected floating-point \[2, q, 3, 9, 2\], found .* \[2, 7, 3, 10, 2\]",
        ),
        ({"points": [5]}, r"^points: expected 2 counts, one a level, found \[5\]"),
        ({"points": [11, -1]}, r"^points: expected 2 counts, one a level, found \[11, -1\]"),
        ({"weights": BY.to("meta")}, r"^weights: expected value's device cpu, found meta"),
    ],
)
def test_errors_name_the_argument(changed, message):
    arguments = {"value": VALUE, "shapes": [(2, 3), (2, 2)], "locations": AT, "weights": BY, **changed}
    with pytest.raises(ValueError, match=message):
        deformable_attention(**arguments)


@needs_kernel
def test_the_kernel_checks_for_itself():
    op = torch.ops.fasttune.deformable_attention
    at, by = AT.flatten(3, 4), BY.flatten(3)
    for arguments in (
        (VALUE, [2, 3, 2, 3], [5, 5], at, by),
        (VALUE, [2, 3, 2, 2], [5, 4], at, by),
        (VALUE, [2, 3, 2], [5, 5], at, by),
        (VALUE[:1], [2, 3, 2, 2], [5, 5], at, by),
        (VALUE, [2, 3, 2, 2], [5, 5], at, by[:, :1]),
    ):
        with pytest.raises(ValueError, match=r"^deformable_attention: "):
            op(*arguments)
