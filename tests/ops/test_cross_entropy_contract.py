"""Cross-entropy in company: in place, compiled, checkpointed, misused, and where others went wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fasttune.ops import backend, cross_entropy, library

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
PLAIN = (-100, 0.0, 0.0, 0.0)
"""ignore_index, label_smoothing, softcap and z_loss of the low-level ops."""
needs_kernel = pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
fasttune = torch.ops.fasttune


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def make(rows: int, classes: int, dtype=torch.float32, device="cpu"):
    """Logits, every third row ignored."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    target[::3] = -100
    return logits.requires_grad_(), target


def with_grad(loss, logits, upstream=None):
    return loss, torch.autograd.grad(loss, logits, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_in_place_gives_the_same_and_takes_no_memory(dtype, reduction, upstream, device):
    logits, target = make(31, 507, dtype, device)
    up = torch.full((31,) if reduction == "none" else (), upstream, device=device)
    expected = with_grad(cross_entropy(logits, target, reduction=reduction), logits, up)
    written = logits * 1
    loss = cross_entropy(written, target, reduction=reduction, inplace=True)
    if reduction == "none":
        assert torch.equal(written, logits)
    seen = []
    written.register_hook(lambda grad: seen.append(grad.data_ptr()))
    found = with_grad(loss, logits, up)
    assert seen == [written.data_ptr()]
    # Of the gradient: scaled after its one rounding where the upstream gradient is not 1, so rounded twice.
    epsilon = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=epsilon, atol=1e-7)


def test_in_place_second_backward_is_equal_or_raises(device):
    logits, target = make(31, 507, device=device)
    loss = cross_entropy(logits * 1, target, inplace=True)
    if device == "cpu":
        first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
    for options, upstream in (({}, torch.tensor(2.0)), ({"reduction": "none"}, torch.ones(31))):
        loss = cross_entropy(logits * 1, target, inplace=True, **options)
        torch.autograd.grad(loss, logits, upstream.to(device), retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, logits, upstream.to(device))


def test_in_place_is_a_permission(device):
    logits, target = make(31, 507, device=device)
    before = logits.detach().clone()
    cross_entropy(logits.detach(), target, inplace=True)
    with torch.no_grad():
        cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, before)
    expected = with_grad(cross_entropy(logits, target), logits)
    turned = logits.t().contiguous().t()  # classes apart: no row to write over
    found = with_grad(cross_entropy(turned, target, inplace=True), logits)
    torch.testing.assert_close(found[1], expected[1])
    assert torch.equal(turned, before)


def test_in_place_needs_logits_of_another_op(device):
    logits, target = make(6, 7, device=device)
    for leaf in (logits, logits.view(3, 2, 7)):
        with pytest.raises(ValueError, match=r"^inplace: expected logits that another op computed, found a leaf"):
            cross_entropy(leaf, target.view(leaf.shape[:-1]), inplace=True)


def test_in_place_op_refuses_rows_it_cannot_write():
    logits, target = make(6, 7)
    factor = torch.tensor(1.0)
    for bad in (logits.detach().t().contiguous().t(), logits.detach()[:1].expand(6, 7)):
        if library._C is not None:
            with pytest.raises(ValueError, match="expected rows of unit stride that do not overlap"):
                fasttune.cross_entropy_grad_(bad, target, factor, None, *PLAIN)


def test_liger_803_pytorch_190139_offsets_past_2_31(device):
    # Two rows 2^31 elements apart; what lies between is never touched, so it costs no memory on CPU.
    far = 2**31 + 64
    room = torch.empty(far + 300, dtype=torch.bfloat16, device=device)
    logits = room.as_strided((2, 300), (far, 1))
    values, target = make(2, 300, torch.bfloat16, device)
    target[:] = torch.tensor([299, 7], device=device)
    logits.copy_(values.detach())
    expected = with_grad(cross_entropy(values, target, reduction="sum"), values)
    factor = torch.ones((), device=device)
    loss, stats = fasttune.cross_entropy_rows(logits, target, None, *PLAIN)
    grad = fasttune.cross_entropy_rows_backward(logits, target, stats, factor, None, *PLAIN)
    assert torch.equal(loss.sum(), expected[0])
    assert torch.equal(grad, expected[1])
    fasttune.cross_entropy_grad_(logits, target, factor, None, *PLAIN)
    torch.testing.assert_close(logits, expected[1], rtol=2**-8, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_liger_1338_compiled_with_ignored_rows(inplace, device):
    logits, target = make(30, 37, device=device)

    def function(x):
        return cross_entropy(x * 2, target, inplace=inplace)

    truth = with_grad(F.cross_entropy(logits * 2, target), logits)
    found = with_grad(torch.compile(function, fullgraph=True)(logits), logits)
    for mine, other in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, other)
    assert not found[1][::3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_liger_968_678_1298_each_row_has_its_own_upstream_gradient(dtype, inplace, device):
    logits, target = make(31, 507, dtype, device)
    upstream = torch.linspace(-3, 4, 31, device=device)
    wide = logits.detach().double().requires_grad_()
    exact = with_grad(F.cross_entropy(wide, target, reduction="none"), wide, upstream.double())[1]
    loss = cross_entropy(logits * 1, target, reduction="none", inplace=inplace)
    found = with_grad(loss, logits, upstream)[1]
    # One rounding, of 2^-24 or 2^-9 relative, and a few of float32 before it.
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-8, 1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("inplace", [False, True])
def test_liger_1329_1419_gradient_of_a_confident_target_keeps_its_digits(p, inplace, device):
    # p rounded to bfloat16 before subtracting 1 is wrong by 20 % at p = 0.99.
    logits = torch.tensor([[p / (1 - p), 1.0]], dtype=torch.float64, device=device).log().bfloat16()
    logits, target = logits.requires_grad_(), torch.tensor([0], device=device)
    wide = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(wide, target), wide)
    (found,) = torch.autograd.grad(cross_entropy(logits * 1, target, inplace=inplace), logits)
    # One rounding to 8 bits is 2^-9 relative.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)


def test_liger_272_unsloth_5002_another_user_of_the_logits_is_told(device):
    hidden, target = make(31, 507, device=device)
    logits = hidden.tanh()  # saves its result for its backward
    loss = cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = hidden * 1
    entropy = (logits * logits.exp()).sum()  # saved here
    loss = cross_entropy(logits, target, reduction="none", inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (torch.autograd.grad(loss, logits, retain_graph=True), entropy.backward())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_liger_802_unsloth_1134_accumulation_with_a_divisor_is_exact(dtype, inplace, device):
    logits, target = make(32, 11, dtype, device)
    count = (target >= 0).sum()
    whole = with_grad(cross_entropy(logits * 1, target, inplace=inplace), logits)
    for divisor in (int(count), float(count), count, count.double().reshape(1)):
        parts = zip(logits.split(4), target.split(4), strict=True)
        losses = [cross_entropy(one * 1, label, divisor=divisor, inplace=inplace) for one, label in parts]
        loss, grad = with_grad(sum(losses), logits)
        torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=0)
        assert torch.equal(grad, whole[1])
    assert cross_entropy(logits, torch.full_like(target, -100), divisor=0) == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_transformer_engine_2139_upstream_gradients_of_any_stride(inplace, device):
    logits, target = make(31, 37, device=device)

    def of(upstream):
        loss = cross_entropy(logits * 1, target, reduction="none", inplace=inplace)
        return with_grad(loss, logits, upstream)[1]

    wide = torch.randn(62, device=device)
    assert torch.equal(of(wide[::2]), of(wide[::2].contiguous()))
    assert torch.equal(of(wide[:1].expand(31)), of(wide[:1].repeat(31)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_liger_1303_launches_on_the_device_of_the_tensor():
    logits, target = make(31, 507, device="cuda:1")
    with torch.cuda.device(0):
        found = with_grad(cross_entropy(logits, target), logits)
    for mine, other in zip(found, with_grad(F.cross_entropy(logits, target), logits), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(dtype, reduction, device):
    logits, target = make(9, 37, dtype, device=device)
    upstream = torch.randn(9 if reduction == "none" else (), device=device)
    upstream = upstream.to(torch.promote_types(dtype, torch.float32))
    options = {"weight": torch.rand(37, device=device), "softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.1}

    def function(logits, target):
        return cross_entropy(logits * 2, target, reduction=reduction, inplace=True, return_lse=True, **options)

    expected = function(logits, target)
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(found[1], expected[1])
    ours, theirs = (with_grad(loss, logits, upstream) for loss, _ in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointing_recomputes_the_same(inplace, device):
    logits, target = make(123, 507, device=device)

    def block(x):
        return cross_entropy(x * 2, target, inplace=inplace)

    plain = with_grad(block(logits), logits)
    again = with_grad(checkpoint(block, logits, use_reentrant=False), logits)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("label", [-1, 7, 2**40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_out_of_range_names_row_and_range(label, dtype, weighted):
    logits, target = make(6, 7, dtype)
    target[4] = label
    weight = torch.ones(7) if weighted else None
    message = rf"label {label} in row 4 is out of range: expected \[0, 7\) or ignore_index -100"
    with pytest.raises(IndexError, match=message):
        cross_entropy(logits, target, weight=weight)
    before = logits.detach().clone()
    written = logits * 1
    with pytest.raises(IndexError, match=message):
        cross_entropy(written, target, weight=weight, inplace=True)
    assert torch.equal(written, before)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="in row 4 is out of range"):
        compiled(logits, target)


def test_ignore_index_may_be_a_class(device):
    for dtype in (torch.float64, torch.float32):
        logits, target = make(40, 5, dtype, device=device)
        target[::3] = 2
        found = cross_entropy(logits, target, ignore_index=2)
        torch.testing.assert_close(found, F.cross_entropy(logits, target, ignore_index=2))


def test_opcheck(device):
    logits, target = make(5, 7, device=device)
    weight, factor = torch.rand(7, device=device), torch.rand(5, device=device)
    options = (weight, -100, 0.1, 5.0, 0.1)
    stats = fasttune.cross_entropy_rows(logits.detach(), target, *options)[1]
    torch.library.opcheck(fasttune.checked_labels, (target, 7, -100))
    torch.library.opcheck(fasttune.scale_, (logits.detach().clone(), torch.tensor(2.0)))
    torch.library.opcheck(fasttune.cross_entropy_rows, (logits, target, *options))
    torch.library.opcheck(
        fasttune.cross_entropy_rows, (logits.detach().bfloat16().t().contiguous().t(), target, None, *PLAIN)
    )
    torch.library.opcheck(fasttune.cross_entropy_rows_backward, (logits.detach(), target, stats, factor, *options))
    torch.library.opcheck(fasttune.cross_entropy_grad_, (logits.detach().clone(), target, factor, *options))


@needs_kernel
def test_backend_tells_who_runs_it_and_why_not():
    for dtype in (torch.float32, torch.bfloat16):
        assert backend("cross_entropy", torch.ones(2, 3, dtype=dtype)).name == "cpu"
    for dtype in (torch.float64, torch.float16):
        found = backend("cross_entropy", torch.ones(2, 3, dtype=dtype))
        assert found.name == "reference"
        assert found.why == f"the kernels of cross_entropy do not take {dtype} on cpu"


@needs_kernel
def test_kernel_checks_what_it_is_given():
    logits, target = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    rows, one = fasttune.cross_entropy_rows, torch.tensor(1.0)
    with pytest.raises(TypeError, match="logits: expected float32 or bfloat16 on CPU, found Double"):
        rows(logits.double(), target, None, *PLAIN)
    with pytest.raises(ValueError, match=r"logits: expected shape \[N, V\]"):
        rows(logits[0], target, None, *PLAIN)
    with pytest.raises(ValueError, match=r"target: expected shape \[2\], found \[3\]"):
        rows(logits, torch.zeros(3, dtype=torch.int64), None, *PLAIN)
    with pytest.raises(TypeError, match="target: expected int64"):
        rows(logits, target.int(), None, *PLAIN)
    with pytest.raises(ValueError, match=r"weight: expected float32 of shape \[3\]"):
        rows(logits, target, torch.ones(2), *PLAIN)
    with pytest.raises(ValueError, match="factor: expected one float32 or one a row"):
        fasttune.cross_entropy_grad_(logits, target, torch.ones(3), None, *PLAIN)
    with pytest.raises(ValueError, match=r"stats: expected float32 of shape \[2, 2\]"):
        fasttune.cross_entropy_rows_backward(logits, target, torch.ones(2), one, None, *PLAIN)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": torch.ones(6, 7, dtype=torch.int64)}, TypeError, r"^logits: .* found torch\.int64"),
        ({"target": torch.ones(6)}, TypeError, r"^target: .* found torch\.float32"),
        ({"target": torch.ones(6, dtype=torch.bool)}, TypeError, r"^target: .* found torch\.bool"),
        ({"logits": torch.ones(6, 0)}, ValueError, r"^logits: .* found \[6, 0\]"),
        (
            {"target": torch.ones(5, dtype=torch.int64)},
            ValueError,
            r"^target: expected shape \[6\] .* found \[5\]",
        ),
        ({"weight": torch.ones(6)}, ValueError, r"^weight: expected shape \[7\], found \[6\]"),
        ({"weight": torch.ones(7, requires_grad=True)}, ValueError, r"^weight: expected a constant"),
        ({"label_smoothing": 1.2}, ValueError, r"^label_smoothing: .* found 1.2"),
        ({"softcap": 0.0}, ValueError, r"^softcap: .* found 0.0"),
        ({"z_loss": -1.0}, ValueError, r"^z_loss: .* found -1.0"),
        ({"reduction": "batchmean"}, ValueError, r"^reduction: .* found 'batchmean'"),
        ({"divisor": -1}, ValueError, r"^divisor: .* found -1"),
        ({"divisor": torch.ones(2)}, ValueError, r"^divisor: .* found shape \[2\]"),
        ({"divisor": 3, "reduction": "sum"}, ValueError, r"^divisor: expected None with reduction 'sum'"),
    ],
)
def test_errors_name_the_argument(changed, error, message):
    arguments = {"logits": torch.ones(6, 7), "target": torch.ones(6, dtype=torch.int64), **changed}
    with pytest.raises(error, match=message):
        cross_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)
