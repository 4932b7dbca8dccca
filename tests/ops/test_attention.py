"""Attention: numbers, against float64 and against the plain composition of PyTorch's ops in the same dtype."""

from __future__ import annotations

import pytest
import torch

from fasttune.ops import backend, library
from fasttune.ops.attention import attention_backward_reference, attention_reference
from fasttune.ops.dropout import mask_reference

KERNEL = backend("attention", torch.empty(0))
needs_kernel = pytest.mark.skipif(KERNEL.name == "reference", reason=f"no kernel: {KERNEL.why}")
SEED = torch.tensor(-7171717171717)
# b, h, h/g, q, k, d. The kernel pads rows (the queries of all heads that share a key head), keys and width to
# multiples of 16, and takes the rows in even blocks of at most 96 Ki scores, but of 16 rows at least: 331 x 331 in
# two blocks, 4 x 600 x 98 in three, 50 x 4000 in four with two rows in the last, 33 x 60000 in three with one.
SIZES = [
    (1, 1, 1, 1, 1, 5),
    (1, 1, 1, 17, 13, 8),
    (5, 4, 2, 13, 17, 8),
    (1, 4, 1, 17, 98, 32),
    (5, 2, 2, 98, 1, 64),
    (2, 12, 12, 98, 98, 32),
    (2, 8, 4, 98, 257, 5),
    (1, 3, 3, 331, 331, 64),
    (2, 4, 1, 600, 98, 32),
    (1, 2, 2, 13, 600, 5),
    (1, 1, 1, 15, 31, 15),
    (1, 2, 1, 16, 32, 16),
    (2, 2, 2, 33, 49, 33),
    pytest.param((1, 1, 1, 50, 4000, 16), marks=needs_kernel),  # the reference knows no blocks
    pytest.param((1, 1, 1, 33, 60000, 8), marks=needs_kernel),
]
# Relative to the truth, in norm: about a tenth of what one rounding to the dtype costs.
EPSILON = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-3}


def make(b, h, shared, q, k, d, dtype=torch.float32):
    """query [b, h, q, d], key and value [b, shared, k, d], all wanting gradients."""
    generator = torch.Generator().manual_seed(b + 10 * h + 100 * q + 1000 * k)

    def random(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return random(b, h, q, d), random(b, shared, k, d), random(b, shared, k, d)


def run(query, key, value, mask=None, scale=0.4, p=0.0, seed=None):
    op = attention_reference if library.OPS["attention"].refuses(query) else torch.ops.fasttune.attention
    return op(query, key, value, mask, scale, p, seed)[0]


def plain(query, key, value, mask=None, scale=0.4, p=0.0, seed=None):
    """What a model's own code says, in query's dtype throughout."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
    if seed is not None:
        kept = mask_reference(weights.shape, p, seed)
        weights = torch.where(kept, weights / (1 - p), 0)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def with_grads(function, inputs, upstream, *options, **named):
    out = function(*inputs, *options, **named)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def double(inputs):
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def assert_close_to_truth(inputs, mask=None, **options):
    """Result and gradients: shapes and dtypes, and an error at most that of the plain composition + epsilon."""
    dtype = inputs[0].dtype
    b, h, q, d = inputs[0].shape
    upstream = torch.randn(b, q, h, d, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact_mask = None if mask is None else mask.double()
    truth = with_grads(plain, double(inputs), upstream, exact_mask, **options)
    theirs = with_grads(plain, inputs, upstream, mask, **options)
    ours = with_grads(run, inputs, upstream, mask, **options)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == exact.shape
        allowed = (other.double() - exact).norm() + EPSILON[dtype] * exact.norm()
        assert (mine.double() - exact).norm() <= allowed
    return ours


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_is_at_most_that_of_the_plain_composition(size, p, dtype):
    assert_close_to_truth(make(*size, dtype=dtype), p=p, seed=SEED if p else None)


def test_float16_goes_by_the_reference():
    query, key, value = make(2, 4, 2, 13, 17, 8, dtype=torch.float16)
    out = run(query, key, value)
    exact = plain(*double((query, key, value)))
    assert out.dtype == torch.float16
    assert (out - exact).norm() <= 2**-10 * exact.norm()  # half a unit of 11 bits, and the scores' own rounding


@pytest.mark.parametrize(
    ("scale", "dtype"),
    # At 30 the rounding of a bfloat16 score makes or breaks its weight: there chance decides who errs more.
    [
        (0.0, torch.float32),
        (-1.3, torch.float32),
        (30.0, torch.float32),
        (0.0, torch.bfloat16),
        (-1.3, torch.bfloat16),
    ],
)
def test_any_scale(scale, dtype):
    assert_close_to_truth(make(2, 4, 2, 17, 98, 8, dtype=dtype), scale=scale)


def masks(b, h, q, k, dtype):
    generator = torch.Generator().manual_seed(6)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    lowest = random(b, 1, q, k)
    lowest[torch.rand(b, 1, q, k, generator=generator) < 0.3] = torch.finfo(dtype).min
    return {
        "[]": random(1)[0],
        "[k]": random(k),
        "[q, 1]": random(q, 1),
        "[1, 1, 1, k]": random(1, 1, 1, k),
        "[b, 1, 1, k]": random(b, 1, 1, k),
        "[b, 1, q, k]": random(b, 1, q, k),
        "[h, q, k]": random(h, q, k),
        "[b, h, q, k]": random(b, h, q, k),
        "expanded": random(b, 1, 1, k).expand(b, h, q, k),
        "a slice": random(b, 1, q, k + 9)[..., 4 : k + 4],
        "every other": random(b, 1, q, 2 * k)[..., ::2],
        "transposed": random(k, q).t(),
        "lowest": lowest,
        "-inf": torch.where(lowest < -1e30, -torch.inf, lowest).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", masks(1, 1, 1, 1, torch.float32))
def test_masks_of_every_form(form, dtype):
    for size in ((3, 4, 2, 13, 17, 8), (1, 12, 12, 98, 98, 5)):
        b, h, _, q, k, _ = size
        mask = masks(b, h, q, k, dtype)[form]
        assert_close_to_truth(make(*size, dtype=dtype), mask)


def test_a_float32_mask_keeps_its_digits_and_its_range_among_bfloat16():
    """-127.3, as a bias by distance may be, is -127.5 in bfloat16, and float32's lowest number -inf."""
    inputs = make(2, 2, 2, 17, 600, 8, dtype=torch.bfloat16)
    mask = -100 - 0.2121 * torch.arange(600.0)
    exact = plain(*double(inputs), mask.double())
    rounded = run(*inputs, mask.bfloat16())
    assert (run(*inputs, mask) - exact).norm() < 0.5 * (rounded - exact).norm()
    hidden = run(*inputs, torch.full((600,), torch.finfo(torch.float32).min))
    assert hidden.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 13, 98])
def test_rows_masked_altogether_by_the_lowest_number_weigh_all_keys_alike(keys, dtype):
    """As for padding in transformers' masks: the score is lost in the lowest number's rounding."""
    query, key, value = make(2, 2, 2, 17, keys, 8, dtype=dtype)
    mask = torch.zeros(2, 1, 17, keys, dtype=dtype)
    mask[1, :, 5:] = torch.finfo(dtype).min
    out, *gradients = assert_close_to_truth((query, key, value), mask)
    mean = value[1].double().mean(1)  # [h, d]
    torch.testing.assert_close(out[1, 5:].double(), mean.expand(12, 2, 8), rtol=2**-6, atol=2**-8)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_nothing_but_minus_infinity_are_nan_as_torch_has_them(dtype):
    inputs = make(2, 4, 2, 13, 17, 8, dtype=dtype)
    mask = torch.zeros(2, 1, 13, 17, dtype=dtype)
    mask[0, :, 3] = -torch.inf
    upstream = torch.randn(2, 13, 4, 8).to(dtype)
    ours, theirs = (with_grads(f, inputs, upstream, mask) for f in (run, plain))
    assert ours[0][0, 3].isnan().all()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_come_through(dtype):
    query, key, value = (tensor.detach() for tensor in make(1, 2, 2, 13, 17, 8, dtype=dtype))
    query[0, 0, 3, 1] = torch.nan
    query[0, 1, 5, 2] = torch.inf
    ours, theirs = run(query, key, value), plain(query, key, value)
    assert ours.isnan().any()
    assert torch.equal(ours.isnan(), theirs.isnan())


def test_large_scores_do_not_overflow():
    query, key, value = (100 * tensor.detach() for tensor in make(2, 2, 2, 98, 98, 32))
    assert_close_to_truth([tensor.requires_grad_() for tensor in (query, key, value)], scale=1.0)


@pytest.mark.parametrize("shape", [(0, 4, 2, 13, 17, 8), (2, 4, 2, 0, 17, 8), (0, 2, 2, 0, 1, 8)])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_empty_batch_and_no_queries(shape, p, dtype):
    inputs = make(*shape, dtype=dtype)
    b, h, _, q, k, d = shape
    upstream = torch.empty(b, q, h, d, dtype=dtype)
    mask = torch.zeros(b, 1, q, k, dtype=dtype)
    out, *gradients = with_grads(run, inputs, upstream, mask, p=p, seed=SEED if p else None)
    assert out.shape == (b, q, h, d)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def assert_same(one, other):
    """Bit by bit from the kernel; PyTorch's products of other strides sum in another order."""
    if backend("attention", one).name != "reference":
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other)


def layouts(query, key, value):
    """The same values by other strides: [b, length, h, d] turned, every other column, expanded over the batch."""
    yield [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    yield [torch.stack((tensor, tensor), -1)[..., 0] for tensor in (query, key, value)]
    yield [tensor[:1].expand_as(tensor) for tensor in (query, key, value)]
    yield list(torch.cat((query, query, query), -1).split(query.shape[-1], -1))
    yield [tensor.flip(2).transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strides_change_nothing(dtype):
    query, key, value = (tensor.detach() for tensor in make(3, 4, 4, 17, 17, 8, dtype=dtype))
    upstream = torch.randn(3, 17, 4, 8).to(dtype)
    for strided in layouts(query, key, value):
        results = []
        for inputs in (strided, [tensor.contiguous() for tensor in strided]):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            results.append(with_grads(run, leaves, upstream, p=0.3, seed=SEED))
        for one, other in zip(*results, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_upstream_gradients_of_any_stride(dtype):
    inputs = make(3, 4, 2, 17, 13, 8, dtype=dtype)
    out = run(*inputs, p=0.3, seed=SEED)
    for upstream in (
        torch.randn(3, 4, 17, 8).to(dtype).transpose(1, 2),
        torch.randn(3, 17, 4, 16).to(dtype)[..., ::2],
        torch.randn(17, 4, 8).to(dtype).expand(3, 17, 4, 8),
        torch.ones((), dtype=dtype).expand(3, 17, 4, 8),
    ):
        found = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        expected = torch.autograd.grad(out, inputs, upstream.contiguous(), retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_backward_formulas_are_the_derivative_of_the_reference(size, p):
    inputs = make(*size, dtype=torch.float64)
    b, h, _, q, k, d = size
    seed = SEED if p else None
    mask, upstream = (torch.randn(*shape, dtype=torch.float64) for shape in ((b, 1, q, k), (b, q, h, d)))
    out, stats = attention_reference(*inputs, mask, 0.4, p, seed)
    expected = torch.autograd.grad(out, inputs, upstream)
    with torch.no_grad():
        found = attention_backward_reference(upstream, *inputs, mask, stats, 0.4, p, seed)
    for mine, derivative in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, derivative, rtol=1e-10, atol=1e-12)  # sums in another order


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_saves_the_statistics_of_the_reference(dtype):
    """Maximum and 1 / sum of exp: the backward of either may follow the forward of the other."""
    if refusal := library.OPS["attention"].refuses(torch.empty(0, dtype=dtype)):
        pytest.skip(refusal)
    query, key, value = (tensor.detach() for tensor in make(2, 4, 2, 13, 17, 8, dtype=dtype))
    arguments = (query, key, value, torch.randn(13, 17), 0.4, 0.3, SEED)
    _, ours = torch.ops.fasttune.attention(*arguments)
    _, theirs = attention_reference(*arguments)
    assert ours.dtype == theirs.dtype == torch.float32
    # The reference rounds a score, below 8 before its scale, to bfloat16: by 2^-7 at most.
    torch.testing.assert_close(ours, theirs, **(dict(rtol=1e-2, atol=2e-2) if dtype.itemsize == 2 else {}))
