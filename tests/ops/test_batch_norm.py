"""Batch norm: numbers against float64 and against PyTorch's own, bits, autograd, compilers, messages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fasttune.ops import backend, batch_norm
from fasttune.ops.batch_norm import (
    batch_norm_backward_reference,
    batch_norm_fixed_reference,
    batch_norm_reference,
)

KERNEL = backend("batch_norm")
needs_kernel = pytest.mark.skipif(KERNEL.name == "reference", reason=f"no kernel: {KERNEL.why}")
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("y", "dx", "dweight", "dbias", "mean", "var")
ops = torch.ops.fasttune
# The kernel takes rows side by side as lines of a multiple of 64 columns (of 32 from 64 channels on), what is left
# as single rows, and lines in blocks of 65536 columns, 512 lines at most: 40 x 33 x 29 rows of 12 channels are
# 2392 lines in eight blocks, and 8 rows; two rows of 512 are two lines, of 513 they are no whole line.
SIZES = [
    (8, 12, 32, 32),
    (40, 12, 33, 29),
    (1, 8, 2, 2),
    (2, 1, 5, 7),
    (3, 7, 13, 11),
    (2, 24, 31, 9),
    (1, 63, 40, 40),
    (4, 64, 16, 16),
    (2, 100, 7, 5),
    (2, 96, 61, 61),
    (1, 512, 1, 2),
    (2, 512, 8, 8),
    (1, 513, 1, 2),
    (2, 513, 5, 5),
]


def make(size, dtype, offset=3.0, statistics=torch.float32, track=True):
    """x in channels_last, the six tensors of a batch norm, and an upstream gradient."""
    generator = torch.Generator().manual_seed(sum(size))

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    channels = size[1]
    x = (2 * random(*size) + offset).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (random(channels).to(statistics).requires_grad_() for _ in range(2))
    running = [random(channels).to(statistics), (random(channels).square() + 0.5).to(statistics)] if track else []
    dy = random(*size).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, running or [None, None], weight, bias, dy


def everything(function, x, running, weight, bias, dy, training, wide=None):
    """y, dx, dweight, dbias and the running statistics afterwards; wide: in that type throughout."""
    x, weight, bias, dy = (t.detach().to(wide or t.dtype) for t in (x, weight, bias, dy))
    running = [None if t is None else t.detach().to(wide or t.dtype, copy=True) for t in running]
    wanted = [t.requires_grad_() for t in (x, weight, bias)]
    y = function(x, *running, weight, bias, training=training, momentum=0.3, eps=1e-4)
    return [y, *torch.autograd.grad(y, wanted, dy), *(t for t in running if t is not None)]


def error(found, exact):
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_worse_than_pytorchs_own_against_float64(size, dtype, training):
    made = make(size, dtype)
    ours, theirs, exact = (
        everything(function, *made, training, wide)
        for function, wide in ((batch_norm, None), (F.batch_norm, None), (F.batch_norm, torch.float64))
    )
    for name, found, stock, right in zip(NAMES, ours, theirs, exact, strict=True):
        assert found.dtype == stock.dtype
        assert found.shape == stock.shape
        # A rounding of bfloat16 costs 2e-3. Of two values a channel (512 x 1 x 2), x - mean has lost what rounding
        # the mean took; PyTorch's happens to lose less.
        epsilon = {torch.float32: 4e-6 if size[0] * size[2] * size[3] == 2 else 4e-7, torch.bfloat16: 2e-5}[dtype]
        assert error(found, right) <= 1.05 * error(stock, right) + epsilon, name
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert ours[1].is_contiguous(memory_format=torch.channels_last)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_cancels_however_large_the_mean(dtype):
    """Among others where a block begins with values that are far from the rest."""
    offset = 10_000.0 if dtype == torch.float32 else 100.0
    x, running, weight, bias, dy = make((4, 12, 96, 96), dtype, offset=offset)
    with torch.no_grad():
        x[0, :, :20] = 0.0
        x[0, 3] = 7.0
        x[:, 5] = 1.0  # no variance at all
    ours, exact = (
        everything(function, x, running, weight, bias, dy, True, wide)
        for function, wide in ((batch_norm, None), (F.batch_norm, torch.float64))
    )
    varying = torch.arange(12) != 5
    for found, right in zip(ours, exact, strict=True):
        channel = 1 if found.dim() == 4 else 0
        keep = varying.nonzero().flatten()
        a, b = found.index_select(channel, keep), right.index_select(channel, keep)
        assert error(a, b) <= (1e-5 if dtype == torch.float32 else 4e-3)
    assert torch.equal(ours[0][:, 5], bias[5].to(dtype).expand(4, 96, 96))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_of_the_gradient_give_the_same(dtype):
    size = (3, 12, 13, 11)
    x, running, weight, bias, _ = make(size, dtype)
    whole = torch.randn(3, 2 * 143, 12).to(dtype)
    part = whole[:, :143].transpose(1, 2).unflatten(2, (13, 11))  # of tokens of two levels, as detectors have them
    pooled = torch.randn(3, 12, 1, 1).to(dtype).expand(size)
    for dy in (part, part.contiguous(), pooled, torch.ones(1).to(dtype).expand(size), part.flip(0)):
        dense = dy.contiguous(memory_format=torch.channels_last)
        for training in (True, False):
            found, expected = (everything(batch_norm, x, running, weight, bias, g, training) for g in (dy, dense))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_gradients_are_wanted(training, wanted):
    x, running, weight, bias, dy = make((2, 24, 31, 9), torch.float32)
    expected = everything(batch_norm, x, running, weight, bias, dy, training)[1:4]
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
    y = batch_norm(inputs[0], *(t.clone() for t in running), *inputs[1:], training=training, eps=1e-4)
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy)
    assert all(torch.equal(one, expected[i]) for one, i in zip(found, wanted, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)], ids=str)
def test_without_weight_bias_or_running_statistics(given, training):
    x, running, weight, bias, dy = make((2, 24, 31, 9), torch.float32)
    settings = {"weight": weight, "bias": bias}
    settings = {name: tensor for name, tensor in settings.items() if name in given}
    running = [None, None] if training else running
    wanted = [x, *settings.values()]
    results = []
    for function in (batch_norm, F.batch_norm):
        y = function(x, *running, **settings, training=training)
        results.append((y, *torch.autograd.grad(y, wanted, dy)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_statistics_and_weights_of_bfloat16():
    made = make((4, 64, 16, 16), torch.bfloat16, statistics=torch.bfloat16)
    for training in (True, False):
        ours, exact = (
            everything(function, *made, training, wide)
            for function, wide in ((batch_norm, None), (F.batch_norm, torch.float64))
        )
        for found, right in zip(ours, exact, strict=True):
            assert found.dtype == torch.bfloat16
            assert error(found, right) <= 4e-3  # two roundings


@needs_kernel
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", [(40, 12, 33, 29), (8, 64, 41, 40), (2, 513, 5, 5)], ids=str)
def test_bits_do_not_depend_on_the_threads(size, training):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(batch_norm, *make(size, torch.bfloat16), training))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


# Numbers by integers: torch.randn gives others on another instruction set.
DIGEST = """
import hashlib, torch
import fasttune.ops

def numbers(*shape, by):
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * by) % 2003 / 500 - 2).view(shape)

digest = hashlib.sha256()
for size in ((8, 12, 33, 29), (3, 100, 13, 11), (1, 512, 5, 5)):
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = (numbers(*size, by=by).to(dtype) for by in (7919, 31))
        x, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy))
        weight, bias, mean = (numbers(size[1], by=by).requires_grad_() for by in (3, 5, 11))
        wanted = (x.requires_grad_(), weight, bias)
        running = mean.detach(), mean.detach().abs() + 1
        for training in (True, False):
            given = (None, None) if training else running  # torch.lerp has other bits on other machines
            y = fasttune.ops.batch_norm(x, *given, weight, bias, training=training)
            for tensor in (y.detach(), *torch.autograd.grad(y, wanted, dy)):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(fasttune.ops.build_info()["cpu"], digest.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_gives_the_same_bits():
    names = ("default", "avx2", "avx512")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    found = [run.communicate()[0].split() for run in runs]
    assert found[0][0] == "default"
    assert len({digest for _, digest in found}) == 1


@needs_kernel
def test_nan_and_infinity_stay_in_their_channel():
    x, running, weight, bias, _ = make((2, 24, 31, 9), torch.bfloat16)
    with torch.no_grad():
        x[0, 3, 2, 2], x[1, 7, 0, 0] = float("nan"), float("inf")
    y = batch_norm(x, *running, weight, bias, training=True)
    bad = torch.zeros(24, dtype=torch.bool)
    bad[[3, 7]] = True
    assert y[:, bad].isnan().all()
    assert y[:, ~bad].isfinite().all()


@pytest.mark.parametrize("size", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_an_empty_batch_is_as_pytorch_has_it(size):
    results = [everything(function, *make(size, torch.float32), True) for function in (batch_norm, F.batch_norm)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert batch_norm(torch.ones(size), torch.ones(4), torch.ones(4), training=False).shape == size


def test_other_layouts_dtypes_and_devices_run_pytorchs_own():
    x, running, weight, bias, _ = make((2, 24, 31, 9), torch.float32)
    planar = x.detach().contiguous()
    for other in (planar, x.detach().double(), planar.transpose(2, 3)):
        assert backend("batch_norm", other).name == "reference"
        settings = [t.to(other.dtype) for t in (*running, weight.detach(), bias.detach())]
        ours, theirs = ([t.clone() for t in settings] for _ in range(2))
        assert torch.equal(batch_norm(other, *ours, training=True), F.batch_norm(other, *theirs, training=True))
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    if KERNEL.name == "cpu":
        assert "channels_last" in backend("batch_norm", planar).why
        assert backend("batch_norm", x).name == "cpu"
        assert backend("batch_norm", torch.empty(2, 3, 1, 1)).name == "cpu"


class Specification(torch.autograd.Function):
    """The references as forward and backward; fixed: a mean and a variance, or none for the batch's own."""

    @staticmethod
    def forward(ctx, x, weight, bias, fixed):
        batch_statistics = fixed is None
        if batch_statistics:
            y, *fixed = batch_norm_reference(x, weight, bias, 1e-3)
        else:
            y = batch_norm_fixed_reference(x, weight, bias, *fixed, 1e-3)
        ctx.save_for_backward(x, weight, *fixed)
        ctx.batch_statistics = batch_statistics
        return y

    @staticmethod
    def backward(ctx, dy):
        found = batch_norm_backward_reference(dy, *ctx.saved_tensors, 1e-3, ctx.batch_statistics, [True] * 3)
        return *found, None


FIXED = torch.tensor([0.3, -0.7, 1.1]).double(), torch.tensor([0.5, 2.0, 1.3]).double()


@pytest.mark.parametrize("fixed", [None, FIXED], ids=["training", "evaluation"])
def test_the_reference_passes_gradcheck(fixed):
    x, _, weight, bias, _ = make((2, 3, 2, 3), torch.float64, statistics=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: Specification.apply(*inputs, fixed), (x, weight, bias))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_reference_but_for_rounding(dtype):
    x, running, weight, bias, dy = (t if isinstance(t, list) else t.detach() for t in make((3, 12, 13, 11), dtype))
    epsilon = 1e-6 if dtype == torch.float32 else 1e-3
    pairs = [*zip(ops.batch_norm(x, weight, bias, 1e-3), batch_norm_reference(x, weight, bias, 1e-3), strict=True)]
    fixed = (x, weight, bias, *running, 1e-3)
    pairs.append((ops.batch_norm_fixed(*fixed), batch_norm_fixed_reference(*fixed)))
    for batch_statistics in (True, False):
        arguments = (dy, x, weight, *running, 1e-3, batch_statistics, [True] * 3)
        found = ops.batch_norm_backward(*arguments)
        pairs += zip(found, batch_norm_backward_reference(*arguments), strict=True)
    for found, right in pairs:
        assert found.stride() == right.stride()
        assert error(found, right.double()) <= epsilon


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, running, weight, bias, dy = make((2, 5, 3, 4), dtype)
    torch.library.opcheck(ops.batch_norm, (x, weight, bias, 1e-5))
    torch.library.opcheck(ops.batch_norm, (x.detach(), None, None, 1e-5))
    torch.library.opcheck(ops.batch_norm_fixed, (x, weight, bias, *running, 1e-5))
    torch.library.opcheck(ops.batch_norm_fixed, (x, weight.detach(), None, *running, 1e-5))
    for arguments in ((x.detach(), weight.detach()), (x.detach(), None), (None, weight.detach())):
        wanted = [True, arguments[0] is not None and arguments[1] is not None, False]
        batch = arguments[0] is not None
        torch.library.opcheck(ops.batch_norm_backward, (dy, *arguments, *running, 1e-5, batch, wanted))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_backward_is_equal_and_second_order_is_refused(training):
    x, running, weight, bias, dy = make((2, 24, 31, 9), torch.float32)
    y = batch_norm(x, *running, weight, bias, training=training)
    first, second = (torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    if KERNEL.name == "cpu":
        (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
        with pytest.raises(NotImplementedError, match="once, not twice"):
            dx.sum().backward()


@needs_kernel
def test_what_is_kept_for_the_backward():
    """Of a frozen batch norm nothing of the size of x."""
    x, running, weight, bias, _ = make((2, 24, 31, 9), torch.float32)

    def saved(*arguments, **settings):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            batch_norm(*arguments, **settings)
        return sorted(tensor.numel() for tensor in kept)

    assert saved(x, *running, weight, bias, training=True) == [24, 24, 24, x.numel()]
    assert saved(x, *running, weight.detach(), bias.detach(), training=False) == [24, 24, 24]
    assert saved(x, *running, weight, bias, training=False) == [24, 24, 24, x.numel()]


@needs_kernel
def test_changing_what_was_saved_is_noticed():
    x, running, weight, bias, _ = make((2, 24, 31, 9), torch.float32)
    y = batch_norm(x, *running, weight, bias, training=False)
    running[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(compiler, training):
    x, running, weight, bias, _ = make((2, 24, 31, 9), torch.float32)

    def step(x, mean, variance):
        return batch_norm(x * 1.5, mean, variance, weight, bias, training=training).relu().square().sum()

    results = []
    # A cache knows nothing of our own code's changes.
    with torch._inductor.config.patch(force_disable_caches=True):
        for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
            mean, variance = (t.clone() for t in running)
            loss = function(x, mean, variance)
            results.append((loss, *torch.autograd.grad(loss, (x, weight, bias)), mean, variance))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def arguments(**changed):
    x, running, weight, bias, _ = make((2, 4, 3, 3), torch.bfloat16)
    named = dict(zip(("running_mean", "running_var"), running, strict=True))
    return {"x": x, **named, "weight": weight, "bias": bias, "training": True, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 4, 3)}, r"^x: expected floating-point \[n, c, h, w\], found .* of shape \[2, 4, 3\]"),
        ({"x": torch.ones(2, 4, 3, 3).int()}, r"^x: expected floating-point .* found torch.int32"),
        ({"x": torch.ones(1, 4, 1, 1)}, r"^x: expected more than one value a channel in training, found"),
        ({"weight": torch.ones(3)}, r"^weight: expected shape \[4\] to fit x, found \[3\]"),
        ({"bias": torch.ones(1, 4)}, r"^bias: expected shape \[4\] to fit x, found \[1, 4\]"),
        ({"running_mean": torch.ones(4).half()}, r"^running_mean: expected torch.bfloat16 or float32, found"),
        ({"running_var": None, "training": False}, r"^running_var: expected a tensor where training is false"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(**arguments(**changed))


@needs_kernel
def test_kernel_checks_what_it_is_given():
    x, running, weight, bias, dy = make((2, 4, 3, 3), torch.float32)
    with pytest.raises(ValueError, match=r"x: expected .* in channels_last"):
        ops.batch_norm(x.detach().contiguous(), weight, bias, 1e-5)
    with pytest.raises(TypeError, match="expected float32 or bfloat16 on CPU, found Half"):
        ops.batch_norm(x.detach().half(), None, None, 1e-5)
    with pytest.raises(ValueError, match=r"weight: expected shape \[4\]"):
        ops.batch_norm(x, weight[:3], bias, 1e-5)
    with pytest.raises(ValueError, match="does not fit x"):
        ops.batch_norm_backward(dy[:1], x.detach(), None, *running, 1e-5, True, [True] * 3)
    with pytest.raises(ValueError, match="expected x, found None"):
        ops.batch_norm_backward(dy, None, None, *running, 1e-5, True, [True] * 3)


def test_environment_forces_the_reference():
    code = (
        "import torch, fasttune.ops as ops\n"
        "x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()\n"
        "weight = torch.ones(3, requires_grad=True)\n"
        "for op, extra in (('batch_norm', ()), ('batch_norm_fixed', (torch.zeros(3), torch.ones(3)))):\n"
        "    y = getattr(torch.ops.fasttune, op)(x, weight, None, *extra, 1e-5)\n"
        "    y = y if isinstance(y, torch.Tensor) else y[0]\n"
        "    dx, dw = torch.autograd.grad(y, (x, weight), x.detach())\n"
        "print(ops.backend('batch_norm', x).why, dx.shape, dw.shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTTUNE_REFERENCE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert run.stdout == "FASTTUNE_REFERENCE is set torch.Size([2, 3, 4, 4]) torch.Size([3])\n"
