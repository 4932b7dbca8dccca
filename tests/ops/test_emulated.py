"""The CUDA kernels, whole, on the host: every thread of a cluster a fiber (csrc/emulation/simt.h).

They find wrong indices, missing barriers, misaligned vectors, reads past the end (everything around a tensor is
NaN) and writes past it. Exponentials are the host's, so tolerances say nothing of the device's.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from fasttune.ops import cross_entropy
from fasttune.ops.dropout import dropout_add_reference_, dropout_reference, mask_reference

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
EVERY = [torch.float32, *SIXTEEN_BIT]
EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2**-25, torch.bfloat16: 0.0}  # half the step of subnormals
SEED = -1234567890123456789
MARGIN = 64  # elements


@pytest.fixture(params=[0, 1, 5], ids=["ascending", "descending", "shuffled"])
def order(emulated, request):
    """Runs a test with the warps in another order: a missing barrier shows in one of them."""
    emulated.emulation_order(request.param)
    yield
    emulated.emulation_order(0)


class Guarded:
    """A tensor of this shape and row stride, `skip` elements off a 16-byte boundary, with NaN all around."""

    def __init__(self, values: Tensor, skip: int = 0, stride: int | None = None) -> None:
        rows, columns = values.shape
        stride = columns if stride is None else stride
        length = MARGIN + skip + rows * stride + MARGIN
        self.memory = torch.full((length,), torch.nan, dtype=values.dtype)
        self.tensor = self.memory.as_strided((rows, columns), (stride, 1), MARGIN + skip)
        assert self.memory.data_ptr() % 16 == 0
        self.tensor.copy_(values)
        self.stride = stride
        self.untouched = torch.ones(length, dtype=torch.bool)
        self.untouched.as_strided((rows, columns), (stride, 1), MARGIN + skip).fill_(False)

    def check(self) -> None:
        assert self.memory[self.untouched].isnan().all(), "written outside the tensor"


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def unwritten(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def weights(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(2))


def run_cross_entropy(
    emulated,
    what,
    logits,
    target,
    *,
    grad=None,
    factor=None,
    weight=None,
    plan=None,
    stats=None,
    fault=None,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=0.0,
    z_loss=0.0,
):
    """what: 0 loss and statistics, 1 gradient from statistics, 2 in place. -> loss, stats, the fault's record."""
    rows, columns = logits.tensor.shape
    out = logits if what == 2 else grad
    loss = torch.full((rows,), 123.0)
    stats = torch.full((rows, 2), 123.0) if stats is None else stats
    fault = torch.zeros(5, dtype=torch.int64) if fault is None else fault
    total = None if weight is None else weight.sum()
    emulated.cross_entropy(
        what, logits.tensor, None if out is None else out.tensor, target, weight, total, factor, loss, stats,
        fault, rows, columns, logits.stride, 0 if out is None else out.stride,
        0 if factor is None or factor.numel() == 1 else factor.stride(0), ignore_index,
        torch.tensor([label_smoothing, softcap, z_loss]), logits.tensor.dtype,
        None if plan is None else torch.tensor(plan, dtype=torch.int32),
    )  # fmt: skip
    for guarded in (logits, grad):
        if guarded is not None:
            guarded.check()
    return loss, stats, fault


def exact(logits: Tensor, target: Tensor, factor: Tensor, **options):
    """loss [rows], lse [rows] and gradient by the reference in float64."""
    wide = logits.double().requires_grad_()
    options["softcap"] = options.get("softcap") or None
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    loss, lse = cross_entropy(wide, target, reduction="none", return_lse=True, **options)
    (grad,) = torch.autograd.grad(loss, wide, factor.double().expand_as(loss))
    return loss.detach(), lse, grad


def close(found: Tensor, truth: Tensor, dtype: torch.dtype, slack: float = 1e-6) -> None:
    """One rounding to dtype for each element, and float32 noise relative to the largest."""
    rounding = (EPSILON[dtype] * truth.abs()).clamp(min=SMALLEST[dtype])
    allowed = rounding + slack * truth.abs().max().clamp(min=1e-4)
    assert ((found.double() - truth).abs() <= allowed).all()


OPTIONS = [
    {},
    {"z_loss": 0.1},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"label_smoothing": 0.2, "softcap": 4.0, "z_loss": 0.3, "weight": True},
    {"weight": True},
    {"weight": True, "label_smoothing": 1.0},
]
# cluster, threads, held
PLANS = [(1, 32, 1), (1, 96, 1), (2, 32, 1), (4, 64, 1), (8, 32, 1), (16, 32, 1), (1, 64, 0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cross_entropy_of_every_plan(emulated, plan, dtype, options):
    rows, columns = 5, 507
    options = {**options, "weight": weights(columns) if options.get("weight") else None}
    values = random(rows, columns, dtype=dtype) * 4
    target = torch.tensor([506, -100, 0, 8, 123])
    factor = random(rows, seed=1)
    loss, lse, grad = exact(values, target, factor, **options)
    logits = Guarded(values, skip=3, stride=509)
    found, stats, fault = run_cross_entropy(emulated, 2, logits, target, factor=factor, plan=plan, **options)
    assert not fault.any()
    close(found, loss, torch.float32)
    close(stats.double().sum(-1), lse, torch.float32)
    close(logits.tensor, grad, dtype)
    assert not logits.tensor[1].any()
    assert not stats[1].any()


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 252, 1000, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_of_ugly_sizes_and_alignments(emulated, columns, dtype):
    rows = 3
    values = random(rows, columns, dtype=dtype) * 3
    target = torch.tensor([columns - 1, 0, columns // 2])
    factor = torch.tensor([-0.7])
    loss, lse, grad = exact(values, target, factor)
    for skip, pad in itertools.product((0, 1, 7), (0, 1, 8)):
        logits = Guarded(values, skip, columns + pad)
        found, stats, _ = run_cross_entropy(emulated, 0, logits, target)
        assert torch.equal(logits.tensor, values)
        close(found, loss, torch.float32)
        close(stats.double().sum(-1), lse, torch.float32)
        for out_skip in (0, skip):
            out = Guarded(torch.full_like(values, 9.0), out_skip)
            run_cross_entropy(emulated, 1, logits, target, grad=out, factor=factor, stats=stats)
            close(out.tensor, grad, dtype)
        again, _, _ = run_cross_entropy(emulated, 2, logits, target, factor=factor)
        close(again, loss, torch.float32)
        close(logits.tensor, grad, dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_cross_entropy_forward_and_backward(emulated, dtype, options, order):
    rows, columns = 4, 1500
    options = {**options, "weight": weights(columns) if options.get("weight") else None}
    values = random(rows, columns, dtype=dtype) * 4
    target = torch.tensor([3, 1499, -100, 700])
    factor = random(2 * rows, seed=1)[::2]
    loss, lse, grad = exact(values, target, factor, **options)
    logits, out = Guarded(values, skip=1), Guarded(torch.full_like(values, 9.0), skip=1)
    found, stats, _ = run_cross_entropy(emulated, 0, logits, target, **options)
    close(found, loss, torch.float32)
    close(stats.double().sum(-1), lse, torch.float32)
    run_cross_entropy(emulated, 1, logits, target, grad=out, factor=factor, stats=stats, **options)
    close(out.tensor, grad, dtype)


def test_cluster_in_every_order_of_its_threads(emulated, order):
    values = random(3, 2000, dtype=torch.bfloat16) * 5
    target = torch.tensor([1, 1999, 1000])
    loss, _, grad = exact(values, target, torch.ones(1), label_smoothing=0.1)
    logits = Guarded(values)
    found, _, _ = run_cross_entropy(
        emulated, 2, logits, target, factor=torch.ones(1), plan=(4, 64, 1), label_smoothing=0.1
    )
    close(found, loss, torch.float32)
    close(logits.tensor, grad, torch.bfloat16)


def test_a_wide_row_by_its_own_plan(emulated):
    values = random(1, 128256, dtype=torch.bfloat16) * 3
    target = torch.tensor([128255])
    loss, _, grad = exact(values, target, torch.ones(1))
    logits = Guarded(values)
    found, _, _ = run_cross_entropy(emulated, 2, logits, target, factor=torch.ones(1))
    close(found, loss, torch.float32)
    close(logits.tensor, grad, torch.bfloat16)


@pytest.mark.parametrize("plan", [(2, 32, 1), (1, 32, 0)], ids=str)
@pytest.mark.parametrize("what", [0, 2])
def test_first_label_out_of_range_is_recorded(emulated, what, plan, order):
    values = random(7, 100)
    target = torch.tensor([1, -100, 100, 2, -1, 2**40, 3])
    logits = Guarded(values)
    factor = torch.ones(1)
    loss, stats, fault = run_cross_entropy(emulated, what, logits, target, factor=factor, plan=plan)
    assert fault[0] & 0xFFFFFFFF == 2
    assert fault[1:].tolist() == [2, 100, 100, -100]
    bad = torch.tensor([False, False, True, False, True, True, False])
    assert torch.equal(loss.isnan(), bad)
    assert not stats[bad].any()
    if what == 2:
        assert not logits.tensor[bad].any()
        assert logits.tensor[~bad][[0, 2, 3]].any(-1).all()
    # Nobody has read the record yet: a later launch leaves it as it is.
    before = fault.clone()
    target = torch.tensor([101, 0, 0, 0, 0, 0, 0])
    run_cross_entropy(emulated, what, logits, target, factor=factor, plan=plan, fault=fault)
    assert torch.equal(fault, before)


@pytest.mark.parametrize("plan", [(2, 32, 1), (1, 64, 0)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_special_values(emulated, plan, softcap):
    values = random(5, 600)
    values[0, 100:] = -torch.inf  # whole threads that see nothing
    values[1] = torch.nan  # ignored
    values[2, 5] = torch.nan
    values[3, :] = -torch.inf
    target = torch.tensor([3, -100, 1, 2, 4])
    loss, _, grad = exact(values, target, torch.ones(1), softcap=softcap)
    logits = Guarded(values)
    found, _, _ = run_cross_entropy(emulated, 2, logits, target, factor=torch.ones(1), plan=plan, softcap=softcap)
    assert torch.equal(found.isnan(), loss.isnan())
    assert torch.equal(logits.tensor.isnan(), grad.isnan())
    fine = ~loss.isnan()
    close(found[fine], loss[fine], torch.float32)
    close(logits.tensor[fine], grad[fine], torch.float32)


def test_no_rows(emulated):
    empty, target = Guarded(torch.empty(0, 7)), torch.empty(0, dtype=torch.int64)
    for what in (0, 1, 2):
        run_cross_entropy(emulated, what, empty, target, grad=empty, factor=torch.ones(1))


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("n", [1, 3, 8, 252, 4097, 9000])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 1 - 1e-6, 1.0])
def test_dropout_is_the_reference_bitwise(emulated, n, dtype, p):
    x = random(1, n, dtype=dtype)
    seed = torch.tensor(SEED)
    for skip in (0, 1):
        source, out = Guarded(x, skip), Guarded(unwritten(1, n, dtype=dtype), skip)
        emulated.dropout(source.tensor, out.tensor, n, p, ctypes.c_int64(SEED), dtype, 0)
        out.check()
        assert torch.equal(out.tensor, dropout_reference(x, p, seed))
        sums = random(1, n, dtype=dtype, seed=1)
        out = Guarded(sums, skip)
        emulated.dropout(source.tensor, out.tensor, n, p, ctypes.c_int64(SEED), dtype, 1)
        out.check()
        dropout_add_reference_(sums, x, p, seed)
        assert torch.equal(out.tensor, sums)


# rows, features, rank: features that are multiples of 8 go to the tensor cores, others do not.
SHAPES = [
    (1, 8, 1), (7, 40, 5), (33, 200, 16), (40, 1032, 8), (300, 72, 17), (70, 136, 33), (20, 48, 100),
    (5, 7, 3), (50, 123, 16), (17, 252, 20), (600, 64, 8), (18, 64, 130), (0, 16, 4), (9, 24, 0),
]  # fmt: skip


def dropped(x: Tensor, p: float) -> Tensor:
    """mask o x / (1 - p) in float64."""
    kept = mask_reference(x.shape, p, torch.tensor(SEED))
    return torch.where(kept, x.double(), 0.0) * (1 / (1 - p) if p < 1 else 0.0)


def sums_close(found: Tensor, truth: Tensor, terms: Tensor) -> None:
    """A sum rounded once: to its own dtype, after float32 noise relative to the sum of absolute terms."""
    rounding = (EPSILON[found.dtype] * truth.abs()).clamp(min=SMALLEST[found.dtype])
    allowed = rounding + 1e-6 * terms + 1e-30
    assert ((found.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_products(emulated, shape, dtype, p):
    rows, features, rank = shape
    seed = ctypes.c_int64(SEED)
    x, a = Guarded(random(rows, features, dtype=dtype)), Guarded(random(rank, features, dtype=dtype, seed=1))
    d = dropped(x.tensor, p)

    low = Guarded(unwritten(rows, rank, dtype=dtype))
    emulated.down(x.tensor, a.tensor, low.tensor, rows, features, rank, p, seed, dtype)
    sums_close(low.tensor, d @ a.tensor.double().T, d.abs() @ a.tensor.double().abs().T)

    dlow = Guarded(random(rows, rank, dtype=dtype, seed=2))
    wide = dlow.tensor.double()
    da = Guarded(unwritten(rank, features))
    emulated.down_backward(x.tensor, dlow.tensor, da.tensor, rows, features, rank, p, seed, dtype)
    sums_close(da.tensor, wide.T @ d, wide.abs().T @ d.abs())

    dx = Guarded(random(rows, features, dtype=dtype, seed=3))
    before = dx.tensor.clone()
    emulated.add(dx.tensor, dlow.tensor, a.tensor, rows, features, rank, p, seed, dtype)
    kept = mask_reference(x.tensor.shape, p, torch.tensor(SEED)) / (1 - p)
    product, terms = wide @ a.tensor.double(), wide.abs() @ a.tensor.double().abs()
    sums_close(dx.tensor, before.double() + kept * product, before.double().abs() + kept * terms)
    for guarded in (low, da, dx):
        guarded.check()


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_up_backward(emulated, shape, dtype):
    rows, features, rank = shape
    dy = Guarded(random(rows, features, dtype=dtype))
    low, b = Guarded(random(rows, rank, dtype=dtype, seed=1)), Guarded(random(features, rank, dtype=dtype, seed=2))
    dlow, db = Guarded(unwritten(rows, rank, dtype=dtype)), Guarded(unwritten(features, rank))
    emulated.up_backward(dy.tensor, low.tensor, b.tensor, dlow.tensor, db.tensor, rows, features, rank, dtype)
    wide = dy.tensor.double()
    sums_close(dlow.tensor, wide @ b.tensor.double(), wide.abs() @ b.tensor.double().abs())
    sums_close(db.tensor, wide.T @ low.tensor.double(), wide.abs().T @ low.tensor.double().abs())
    dlow.check()
    db.check()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_lora_products_in_every_order_of_threads(emulated, dtype, order):
    # Rows enough that a block goes through several chunks of them.
    test_lora_products(emulated, (2400, 72, 17), dtype, 0.3)
    test_lora_up_backward(emulated, (300, 1032, 17), dtype)


def test_lora_of_tensors_off_a_boundary(emulated):
    rows, features, rank, dtype = 30, 64, 8, torch.bfloat16
    x, a = Guarded(random(rows, features, dtype=dtype), skip=1), random(rank, features, dtype=dtype)
    out = unwritten(rows, rank, dtype=dtype)
    emulated.down(x.tensor, a, out, rows, features, rank, 0.3, ctypes.c_int64(SEED), dtype)
    d = dropped(x.tensor, 0.3)
    sums_close(out, d @ a.double().T, d.abs() @ a.double().abs().T)


def test_everything_dropped(emulated):
    rows, features, rank, dtype = 20, 64, 8, torch.bfloat16
    seed = ctypes.c_int64(SEED)
    x = torch.full((rows, features), torch.inf, dtype=dtype)
    a, dlow = random(rank, features, dtype=dtype), random(rows, rank, dtype=dtype)
    low, da = unwritten(rows, rank, dtype=dtype), unwritten(rank, features)
    dx = random(rows, features, dtype=dtype)
    before = dx.clone()
    emulated.down(x, a, low, rows, features, rank, 1.0, seed, dtype)
    emulated.down_backward(x, dlow, da, rows, features, rank, 1.0, seed, dtype)
    emulated.add(dx, dlow, a, rows, features, rank, 1.0, seed, dtype)
    assert not low.any()
    assert not da.any()
    assert torch.equal(dx, before)


def test_the_emulation_finds_a_barrier_not_all_reach(emulated):
    # 48 threads are no whole number of warps: what the emulation must refuse, or it would refuse nothing.
    with pytest.raises(RuntimeError, match="impossible block"):
        run_cross_entropy(
            emulated, 2, Guarded(random(1, 100)), torch.tensor([1]), factor=torch.ones(1), plan=(1, 48, 1)
        )
