"""The CUDA kernels on a GPU: `make test-gpu`. Their logic runs on the host too, in test_emulated.py.

A tolerance is the error that PyTorch's own op makes in the same dtype against float64 on the same numbers, in
norm, plus one small epsilon a dtype; where the result is float32 whatever the inputs, PyTorch's op in float32.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops import backend, cross_entropy, dropout, library, lora_linear
from fasttune.ops.dropout import drawn_reference, dropout_add_reference_, dropout_reference, mask_reference

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}"),
]
ops = torch.ops.fasttune
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
EVERY = [torch.float32, *SIXTEEN_BIT]
# About a tenth of the dtype's own rounding.
EPSILON = {torch.float32: 1e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
SUMS = 1e-6  # float32 sums of up to 3000 terms in another order
SEED = torch.tensor(-1234567890123456789)


@pytest.fixture(autouse=True)
def no_pending_error():
    yield
    torch.cuda.synchronize()
    library._C.raise_pending()


def random(*shape: int, dtype=torch.float32, seed: int = 0, device=None) -> Tensor:
    generator = torch.Generator(device or DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device or DEVICE).to(dtype)


def skewed(values: Tensor, skip: int, pad: int) -> Tensor:
    """The same numbers in a row stride of columns + pad, `skip` elements off the allocation's start."""
    rows, columns = values.shape
    memory = torch.full((skip + rows * (columns + pad),), torch.nan, dtype=values.dtype, device=values.device)
    out = memory.as_strided((rows, columns), (columns + pad, 1), skip)
    return out.copy_(values)


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def assert_as_good(found: Tensor, theirs: Tensor, truth: Tensor, epsilon: float) -> None:
    assert found.shape == truth.shape
    assert found.isfinite().all()
    assert relative(found, truth) <= relative(theirs, truth) + epsilon


# ---- cross entropy


def by_reference(values: Tensor, target: Tensor, factor: Tensor, weight=None, **options) -> tuple[Tensor, ...]:
    """loss [rows], lse [rows] and gradient by the reference, in the dtype of `values` widened to float32."""
    leaf = values.detach().requires_grad_()
    options["softcap"] = options.get("softcap") or None
    weight = None if weight is None else weight.to(torch.promote_types(leaf.dtype, torch.float32))
    loss, lse = cross_entropy(leaf.cpu(), target.cpu(), weight=None if weight is None else weight.cpu(),
                              reduction="none", return_lse=True, **options)  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf, factor.cpu().to(loss.dtype).expand_as(loss))
    return loss.detach().to(values.device), lse.to(values.device), grad


def plain(values: Tensor, target: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """The same by PyTorch's op, on the device: for sizes that the CPU takes long for."""
    leaf = values.detach().requires_grad_()
    loss = F.cross_entropy(leaf, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, leaf, factor.to(loss.dtype).expand_as(loss))
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return F.cross_entropy(wide, target, reduction="none"), wide.logsumexp(-1), grad


def arguments(weight=None, ignore_index=-100, label_smoothing=0.0, softcap=0.0, z_loss=0.0) -> tuple:
    return weight, ignore_index, label_smoothing, softcap, z_loss


def every_result(logits: Tensor, target: Tensor, factor: Tensor, **options):
    """(loss, stats, gradient), by forward and backward, then in place. logits are overwritten."""
    loss, stats = ops.cross_entropy_rows(logits, target, *arguments(**options))
    before = logits.clone()
    grad = ops.cross_entropy_rows_backward(logits, target, stats, factor, *arguments(**options))
    assert torch.equal(logits, before)
    assert grad.is_contiguous()
    yield loss, stats, grad
    loss, stats = ops.cross_entropy_grad_(logits, target, factor, *arguments(**options))
    yield loss, stats, logits


COLUMNS = [1, 7, 252, 507, 4097, 32000, 50257, 65537, 128256, 256000, 262144, 600000]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_cross_entropy_of_every_width(columns, dtype):
    rows = 37
    values = random(rows, columns, dtype=dtype) * 3
    target = torch.randint(0, columns, (rows,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    target[::5] = -100
    live = target >= 0
    factor = random(rows, seed=2)
    truth = plain(values.double(), target, factor)
    theirs = plain(values, target, factor)
    skews = itertools.product((0, 1), (0, 1, 8)) if columns < 200000 else [(0, 0), (1, 3)]
    for skip, pad in skews:
        for loss, stats, grad in every_result(skewed(values, skip, pad), target, factor):
            assert loss.dtype == stats.dtype == torch.float32
            assert_as_good(loss, theirs[0], truth[0], 1e-7)
            assert_as_good(stats.double().sum(-1)[live], theirs[1][live], truth[1][live], 1e-7)
            assert_as_good(grad, theirs[2], truth[2], EPSILON[dtype])
            assert not grad[~live].any()
            assert not stats[~live].any()


OPTIONS = [
    {"z_loss": 0.1},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"weight": True},
    {"label_smoothing": 0.2, "softcap": 4.0, "z_loss": 0.3, "weight": True},
    {"label_smoothing": 1.0, "ignore_index": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("columns", [507, 40000])
def test_cross_entropy_with_options(columns, dtype, options):
    rows = 23
    values = random(rows, columns, dtype=dtype) * 4
    target = torch.randint(0, columns, (rows,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    ignore_index = options.get("ignore_index", -100)
    target[::4] = ignore_index
    weight = random(columns, seed=3).abs() if options.get("weight") else None
    options = {**options, "weight": weight}
    for factor in (random(rows, seed=2), random(2 * rows, seed=2)[::2], torch.tensor([-0.3], device=DEVICE)):
        truth = by_reference(values.double(), target, factor, **options)
        theirs = by_reference(values, target, factor, **options)
        for loss, _, grad in every_result(values.clone(), target, factor, **options):
            # In float32 the host's exponentials and ours differ by a rounding; 3e-7 are five of them.
            assert_as_good(loss, theirs[0], truth[0], 3e-7)
            assert_as_good(grad, theirs[2], truth[2], max(EPSILON[dtype], 3e-7))


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_gradient_of_a_confident_target_keeps_its_digits(p):
    # Liger-Kernel#1329
    logits = torch.tensor([[p / (1 - p), 1.0]], dtype=torch.float64, device=DEVICE).log().bfloat16()
    target, factor = torch.tensor([0], device=DEVICE), torch.ones(1, device=DEVICE)
    *_, exact = plain(logits.double(), target, factor)
    for _, _, grad in every_result(logits, target, factor):
        torch.testing.assert_close(grad.double(), exact, rtol=2**-8, atol=0)


def test_offsets_past_two_to_the_31():
    rows, columns = 16800, 128256  # 2.15e9 elements
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    few = [0, 1, 16742, 16743, 16744, rows - 1]  # 2^31 lies in row 16743
    logits.fill_(torch.nan)
    values = random(len(few), columns, dtype=torch.bfloat16)
    logits[few] = values
    target = torch.full((rows,), -100, device=DEVICE)
    target[few] = 128255
    factor = torch.ones(1, device=DEVICE)
    truth = plain(values.double(), target[few], factor)
    theirs = plain(values, target[few], factor)
    loss, stats = ops.cross_entropy_rows(logits, target, *arguments())
    assert_as_good(loss[few], theirs[0], truth[0], 1e-7)
    grad = ops.cross_entropy_rows_backward(logits, target, stats, factor, *arguments())
    assert_as_good(grad[few], theirs[2], truth[2], 1e-3)
    del grad
    ops.cross_entropy_grad_(logits, target, factor, *arguments())
    assert_as_good(logits[few], theirs[2], truth[2], 1e-3)
    others = torch.ones(rows, dtype=torch.bool)
    others[few] = False
    assert not logits[others.to(DEVICE).nonzero().flatten()[::97]].any()
    assert not logits[16745].any()


def test_ignored_rows_whatever_they_hold():
    logits = torch.full((6, 40000), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    target = torch.full((6,), -100, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    for loss, stats, grad in every_result(torch.full_like(logits, torch.inf), target, one):
        assert not loss.any()
        assert not stats.any()
        assert not grad.any()
    loss, _ = ops.cross_entropy_grad_(logits, target, one, *arguments())
    assert not loss.any()
    assert not logits.any()


def test_no_rows():
    for columns in (7, 40000):
        logits = torch.empty(0, columns, device=DEVICE)
        target = torch.empty(0, dtype=torch.int64, device=DEVICE)
        for loss, stats, grad in every_result(logits, target, torch.ones(1, device=DEVICE)):
            assert (loss.shape, stats.shape, grad.shape) == ((0,), (0, 2), (0, columns))


@pytest.mark.parametrize("columns", [100, 40000, 2**20 + 5])
def test_label_out_of_range_is_told_without_a_device_assert(columns):
    logits = random(9, columns)
    target = torch.tensor([1, -100, columns, 2, -1, 2**40, 3, 0, 0], device=DEVICE)
    message = rf"label {columns} in row 2 is out of range: expected \[0, {columns}\) or ignore_index -100"
    for call in (
        lambda: ops.cross_entropy_rows(logits, target, *arguments()),
        lambda: ops.cross_entropy_grad_(logits.clone(), target, torch.ones(1, device=DEVICE), *arguments()),
    ):
        loss, _ = call()
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match=message):
            library._C.raise_pending()
        library._C.raise_pending()
        assert loss.isnan().tolist() == [False, False, True, False, True, True, False, False, False]
        # Otherwise the next call tells.
        call()
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match=message):
            call()
    again, _ = ops.cross_entropy_rows(logits, target.clamp(0, 99), *arguments())
    assert again.isfinite().all()


def test_wrong_arguments_are_named():
    logits, target = random(4, 7), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=r"expected target of shape \[4\]"):
        ops.cross_entropy_rows(logits, target[:3], *arguments())
    with pytest.raises(ValueError, match=r"expected logits \[N, V\] of strides"):
        ops.cross_entropy_grad_(logits.t(), target, one, *arguments())
    with pytest.raises(ValueError, match="expected factor of 1 or 4 elements"):
        ops.cross_entropy_grad_(logits, target, torch.ones(3, device=DEVICE), *arguments())
    with pytest.raises(TypeError, match="takes float32, float16 or bfloat16"):
        ops.cross_entropy_rows(logits.double(), target, *arguments())
    with pytest.raises(ValueError, match=r"expected a of shape"):
        ops.lora_down(logits, random(2, 8), 0.0, None)
    with pytest.raises(ValueError, match="a seed must be given"):
        ops.lora_down(logits, random(2, 7), 0.5, None)


# ---- dropout


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (252,), (507, 123), (4097,), (0,), (5, 0), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0, 1e-12, 1 - 1e-12])
def test_dropout_is_the_cpus_bitwise(shape, dtype, p):
    x, acc = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    assert torch.equal(ops.dropout_seeded(x, p, SEED).cpu(), dropout_reference(x.cpu(), p, SEED))
    theirs = acc.cpu()
    dropout_add_reference_(theirs, x.cpu(), p, SEED)
    ops.dropout_add_(acc, x, p, SEED)
    assert torch.equal(acc.cpu(), theirs)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_dropout_of_strided_and_misaligned_tensors(dtype):
    base = random(40, 60, dtype=dtype)
    for x in (base.t(), base[::2, 1::3], base[:, :1].expand(40, 33), base.flatten()[1:]):
        found = ops.dropout_seeded(x, 0.4, SEED)
        assert torch.equal(found.cpu(), dropout_reference(x.cpu().contiguous(), 0.4, SEED))


def test_dropout_past_two_to_the_32_elements():
    n = 2**32 + 4099
    x = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    found = ops.dropout_seeded(x, 0.5, SEED)
    for first in (0, 2**31 - 8, 2**32 - 8, 2**32 + 4088):
        draws = torch.arange(first // 8, min(first + 16, n) // 8)
        kept = drawn_reference(draws, int(SEED)) >= 2**15
        assert torch.equal(found[first : first + kept.numel()].cpu() != 0, kept)


# ---- the LoRA products

# rows, features, rank: features that are multiples of 8 go to the tensor cores, others do not.
SHAPES = [
    (1, 8, 1), (7, 40, 5), (33, 200, 16), (507, 1032, 8), (2049, 1024, 16), (3000, 4096, 32), (70, 136, 33),
    (200, 480, 100), (1000, 2048, 128), (5, 7, 3), (500, 123, 16), (317, 252, 20), (18, 64, 130), (0, 16, 4),
]  # fmt: skip


def dropped(x: Tensor, p: float) -> Tensor:
    """mask o x / (1 - p) in float64."""
    kept = mask_reference(x.shape, p, SEED).to(x.device)
    return torch.where(kept, x.double(), 0.0) / (1 - p)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_products(shape, dtype, p):
    rows, features, rank = shape
    x, a = random(rows, features, dtype=dtype), random(rank, features, dtype=dtype, seed=1) / 16
    dlow, dx = random(rows, rank, dtype=dtype, seed=2), random(rows, features, dtype=dtype, seed=3)
    seed = SEED if p > 0 else None
    wide = dropped(x, p)
    narrow = wide.to(dtype)

    low = ops.lora_down(x, a, p, seed)
    assert low.dtype == dtype
    assert_as_good(low, narrow @ a.t(), wide @ a.double().t(), max(EPSILON[dtype], SUMS))
    da = ops.lora_down_backward(x, dlow, p, seed)
    assert da.dtype == torch.float32
    assert_as_good(da, dlow.float().t() @ narrow.float(), dlow.double().t() @ wide, SUMS)
    kept = mask_reference(x.shape, p, SEED).to(DEVICE) / (1 - p)
    truth = dx.double() + kept * (dlow.double() @ a.double())
    theirs = dx + kept.to(dtype) * (dlow @ a)
    ops.lora_add_(dx, dlow, a, p, seed)
    assert_as_good(dx, theirs, truth, max(EPSILON[dtype], SUMS))


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_up_backward(shape, dtype):
    rows, features, rank = shape
    dy, low = random(rows, features, dtype=dtype), random(rows, rank, dtype=dtype, seed=1)
    b = random(features, rank, dtype=dtype, seed=2)
    dlow, db = ops.lora_up_backward(dy, low, b)
    assert (dlow.dtype, db.dtype) == (dtype, torch.float32)
    assert_as_good(dlow, dy @ b, dy.double() @ b.double(), max(EPSILON[dtype], SUMS))
    assert_as_good(db, dy.float().t() @ low.float(), dy.double().t() @ low.double(), SUMS)


def test_masks_of_all_ops_are_one_mask():
    rows, ins, p = 300, 512, 0.3
    kept = mask_reference(torch.Size((rows, ins)), p, SEED).to(DEVICE)
    eye = torch.eye(ins, dtype=torch.bfloat16, device=DEVICE)
    ones = torch.ones(rows, ins, dtype=torch.bfloat16, device=DEVICE)
    for first in range(0, ins, 32):  # rank 32: 32 columns of the mask at a time
        some = eye[first : first + 32]
        assert torch.equal(ops.lora_down(ones, some, p, SEED) != 0, kept[:, first : first + 32])
    square = torch.eye(rows, 128, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(ops.lora_down_backward(ones, square, p, SEED) != 0, kept[:128])
    dx = torch.zeros_like(ones)
    ops.lora_add_(dx, torch.ones(rows, 8, dtype=torch.bfloat16, device=DEVICE),
                  torch.ones(8, ins, dtype=torch.bfloat16, device=DEVICE), p, SEED)  # fmt: skip
    assert torch.equal(dx != 0, kept)


# ---- all of them


def all_ops() -> dict[str, Tensor]:
    """Every kernel once, its inputs the same each time. What is written in place is made anew."""
    x = random(1024, 1024, dtype=torch.bfloat16)
    a, b = random(16, 1024, dtype=torch.bfloat16, seed=1), random(1024, 16, dtype=torch.bfloat16, seed=2)
    low = random(1024, 16, dtype=torch.bfloat16, seed=3)
    logits = random(64, 40000, dtype=torch.bfloat16, seed=4)
    target = random(64, seed=5).abs().mul(1000).long()
    one = torch.ones(64, device=DEVICE)
    smooth = arguments(weight=random(40000, seed=6).abs(), label_smoothing=0.1, softcap=20.0, z_loss=1e-4)
    out: dict[str, Tensor] = {}
    for name, options in (("plain", arguments()), ("smooth", smooth)):
        loss, stats = ops.cross_entropy_rows(logits, target, *options)
        out[f"loss {name}"], out[f"stats {name}"] = loss, stats
        out[f"grad {name}"] = ops.cross_entropy_rows_backward(logits, target, stats, one, *options)
        inplace = out[f"inplace {name}"] = logits.clone()
        out[f"inplace loss {name}"], _ = ops.cross_entropy_grad_(inplace, target, one, *options)
    out["dropout"] = ops.dropout_seeded(x, 0.1, SEED)
    out["add"] = x.clone()
    ops.dropout_add_(out["add"], x, 0.1, SEED)
    out["low"] = ops.lora_down(x, a, 0.1, SEED)
    out["dlow"], out["db"] = ops.lora_up_backward(x, low, b)
    out["da"] = ops.lora_down_backward(x, low, 0.1, SEED)
    out["dx"] = x.clone()
    ops.lora_add_(out["dx"], low, a, 0.1, SEED)
    return out


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_results_repeat_to_the_bit():
    first = all_ops()
    for _ in range(20):
        assert same(first, all_ops()) == []


def test_no_op_waits_for_the_device():
    expected = all_ops()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = all_ops()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(expected, found) == []


def test_ops_run_on_the_current_stream():
    expected = all_ops()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # what runs on another stream would be done first, on unready inputs
        found = all_ops()
    torch.cuda.current_stream().wait_stream(side)
    assert same(expected, found) == []


def test_ops_are_captured_in_a_graph():
    expected = all_ops()
    logits = random(64, 40000, dtype=torch.bfloat16, seed=4)
    x = random(1024, 1024, dtype=torch.bfloat16)
    a, low = random(16, 1024, dtype=torch.bfloat16, seed=1), random(1024, 16, dtype=torch.bfloat16, seed=3)
    b = random(1024, 16, dtype=torch.bfloat16, seed=2)
    target = random(64, seed=5).abs().mul(1000).long()
    one = torch.ones(64, device=DEVICE)
    inplace, dx = torch.empty_like(logits), torch.empty_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inplace.copy_(logits)
        loss, _ = ops.cross_entropy_grad_(inplace, target, one, *arguments())
        down = ops.lora_down(x, a, 0.1, SEED)
        dlow, db = ops.lora_up_backward(x, low, b)
        da = ops.lora_down_backward(x, low, 0.1, SEED)
        dx.copy_(x)
        ops.lora_add_(dx, low, a, 0.1, SEED)
    for _ in range(3):
        graph.replay()
    found = {"inplace loss plain": loss, "inplace plain": inplace, "low": down, "dlow": dlow, "db": db, "da": da}
    assert same({**found, "dx": dx}, expected) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_ops_run_on_the_tensors_device():
    # Liger-Kernel#1303
    logits = random(8, 40000, dtype=torch.bfloat16, device="cuda:1")
    target = torch.zeros(8, dtype=torch.int64, device="cuda:1")
    with torch.cuda.device(0):
        loss, _ = ops.cross_entropy_rows(logits, target, *arguments())
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target, reduction="none"))


# ---- through the public ops


def test_backends_are_cuda():
    x = random(4, 8, dtype=torch.bfloat16)
    for op in ("cross_entropy", "dropout", "lora_linear"):
        assert backend(op, x).name == "cuda"


def test_a_step_through_the_public_ops_is_that_of_the_cpu():
    def step(device: str) -> list[Tensor]:
        torch.manual_seed(3)
        x = torch.randn(77, 128, dtype=torch.float64).float().to(device).requires_grad_()
        weight = torch.randn(520, 128).div(11).to(device)
        a = torch.randn(8, 128).div(11).to(device).requires_grad_()
        b = torch.randn(520, 8).to(device).requires_grad_()
        target = torch.randint(0, 520, (77,)).to(device)
        y = lora_linear(x, weight, None, a, b, scale=0.5, dropout=0.2, training=True)
        loss = cross_entropy(dropout(y, 0.1, training=True), target, label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, (x, a, b))]

    for ours, theirs in zip(step(DEVICE), step("cpu"), strict=True):
        # float32 products in another order (TF32 is off by default).
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
