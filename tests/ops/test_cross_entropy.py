"""Cross-entropy: the specification against torch and the formula, the op that runs against the specification."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fasttune.ops import cross_entropy, library
from fasttune.ops.cross_entropy import cross_entropy_reference

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
needs_kernel = pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
fasttune = torch.ops.fasttune


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def make(rows: int = 123, classes: int = 507, dtype=torch.float64, ignored: bool = True, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(device, dtype)
    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    if ignored:
        target[::3] = -100
    return logits.requires_grad_(), target


def with_grad(loss, logits, upstream=None):
    return loss, torch.autograd.grad(loss, logits, upstream)[0]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("classes", [1, 7, 507])
def test_options_of_torch_mean_the_same(reduction, weighted, smoothing, classes):
    logits, target = make(classes=classes)
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    upstream = torch.randn(123 if reduction == "none" else (), dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours = with_grad(cross_entropy(logits, target, **options), logits, upstream)
    theirs = with_grad(F.cross_entropy(logits, target, **options), logits, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        # 1e-10: sums of a few hundred float64 terms in another order.
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_softcap_and_z_loss_follow_the_formula(weighted):
    logits, target = make(rows=21, classes=9)
    weight = torch.rand(9, dtype=torch.float64) if weighted else torch.ones(9, dtype=torch.float64)
    cap, smoothing, z = 4.0, 0.2, 0.3
    capped = cap * torch.tanh(logits / cap)
    lse = capped.logsumexp(-1)
    live = target >= 0
    safe = target.clamp(min=0)
    nll = lse.unsqueeze(-1) - capped
    row = (1 - smoothing) * weight[safe] * nll.gather(1, safe.unsqueeze(1)).squeeze(1)
    row = row + smoothing / 9 * (nll * weight).sum(-1) + z * weight[safe] * lse.square()
    expected = with_grad((row * live).sum() / (weight[safe] * live).sum(), logits)
    loss, found_lse = cross_entropy(
        logits,
        target,
        weight=weight if weighted else None,
        softcap=cap,
        z_loss=z,
        label_smoothing=smoothing,
        return_lse=True,
    )
    for mine, other in zip(with_grad(loss, logits), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found_lse, torch.where(live, lse, 0.0).detach(), rtol=1e-12, atol=1e-12)
    assert not found_lse.requires_grad


def test_gradcheck_with_every_option():
    logits, target = make(rows=5, classes=7)
    weight = torch.rand(7, dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01}
    for reduction in ("mean", "none"):

        def function(x, reduction=reduction):
            return cross_entropy(x, target, reduction=reduction, **options)

        assert torch.autograd.gradcheck(function, logits)
        assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("dtype", "epsilon"), [(torch.float32, 2e-7), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)]
)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_error_is_at_most_that_of_torch(dtype, epsilon, size, inplace, device):
    logits, target = make(device=device)
    logits = (logits * size).detach().to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    truth = with_grad(F.cross_entropy(wide, target) * 3, wide)
    ours = with_grad(cross_entropy(logits.clone(), target, inplace=inplace) * 3, logits)
    theirs = with_grad(F.cross_entropy(logits, target) * 3, logits)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert error(mine, exact) <= error(other, exact) + epsilon


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float32, 3e-7), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("classes", [1, 7, 252, 2051])
def test_options_jointly_follow_the_specification(
    inplace, dtype, epsilon, weighted, smoothing, softcap, classes, device
):
    logits, target = make(31, classes, dtype, device=device)
    weight = torch.rand(classes, device=device) if weighted else None
    upstream = torch.randn(31, device=device)
    options = {"weight": weight, "label_smoothing": smoothing, "softcap": softcap, "z_loss": 0.02}

    def of(logits, op):
        return with_grad(op(logits), logits, upstream.to(torch.promote_types(logits.dtype, torch.float32)))

    def specification(x):
        return cross_entropy_reference(x, target, weight, -100, smoothing, softcap or 0.0, 0.02)[0]

    exact = of(logits.detach().double().requires_grad_(), specification)
    composed = of(logits, specification)
    # Of two, so that one of them may be overwritten.
    found = of(logits, lambda x: cross_entropy(x * 1, target, reduction="none", inplace=inplace, **options))
    # A gradient is a difference of numbers of its upstream's size, and 0 but for the z-loss with one class.
    for mine, other, truth, size in zip(found, composed, exact, (exact[0], upstream), strict=True):
        assert (mine.double() - truth).norm() <= (other.double() - truth).norm() + epsilon * size.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary(dtype, device):
    logits, target = make(3, 262144, dtype, ignored=False, device=device)
    target[1] = 262143
    wide = logits.detach().double().requires_grad_()
    exact = with_grad(F.cross_entropy(wide, target), wide)
    found = with_grad(cross_entropy(logits * 1, target, inplace=True), logits)
    # One rounding of the gradient; a sum of 262144 terms for the loss.
    assert error(found[0], exact[0]) < 1e-6
    assert error(found[1], exact[1]) < (1e-6 if dtype == torch.float32 else 2**-9)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("factor", [0.01, 1e-36])
def test_a_16_bit_gradient_is_the_32_bit_one_rounded_once(softcap, factor):
    # Also where it is subnormal, as it is with the small factor.
    logits, target = make(9, 300, torch.bfloat16)
    options, factor = (-100, 0.0, softcap, 0.0), torch.tensor(factor)
    short, long = logits.detach().clone(), logits.detach().float()
    stats = fasttune.cross_entropy_rows(short, target, None, *options)[1]
    backward = [
        fasttune.cross_entropy_rows_backward(x, target, stats, factor, None, *options) for x in (short, long)
    ]
    for x in (short, long):
        fasttune.cross_entropy_grad_(x, target, factor, None, *options)
    for rounded, wide in ((short, long), backward):
        assert rounded.count_nonzero() > 1000
        assert torch.equal(rounded, wide.bfloat16())


def test_small_capped_logits_keep_their_digits(device):
    # 1 - 2 / (e^2x + 1) for tanh leaves an error of 1e-7, which is 1e-3 of a logit of 1e-4.
    logits = (torch.randn(4, 64, device=device) * 1e-4).requires_grad_()
    stats = fasttune.cross_entropy_rows(logits.detach(), torch.zeros(4, dtype=torch.int64, device=device), None,
                                        -100, 0.0, 30.0, 0.0)[1]  # fmt: skip
    exact = (30 * torch.tanh(logits.double() / 30)).amax(-1)
    torch.testing.assert_close(stats[:, 0].double(), exact, rtol=1e-6, atol=0)


def test_a_common_offset_costs_no_digits(device):
    # With lse - z_y, 1e4 in every logit would leave three digits of a small loss in float32.
    logits = torch.tensor([[8.0, 0.0, -1.0]], device=device)
    target = torch.tensor([0], device=device)
    torch.testing.assert_close(
        cross_entropy(logits + 8192, target), cross_entropy(logits, target), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("inplace", [False, True])
def test_without_supervised_rows_loss_and_gradient_are_zero(reduction, rows, dtype, inplace, device):
    logits, _ = make(rows, 7, dtype, device=device)
    target = torch.full((rows,), -100, device=device)
    loss = cross_entropy(logits * 1, target, reduction=reduction, z_loss=0.1, inplace=inplace).sum()
    loss, grad = with_grad(loss, logits)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ignored_rows_have_gradient_zero_whatever_they_hold(inplace, softcap, device):
    logits, target = make(6, 7, torch.float32, device=device)
    expected = with_grad(cross_entropy(logits * 1, target, softcap=softcap, inplace=inplace), logits)
    with torch.no_grad():
        logits[0], logits[3] = float("nan"), float("-inf")
    found = with_grad(cross_entropy(logits * 1, target, softcap=softcap, inplace=inplace), logits)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not found[1][::3].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_infinite_logits_mean_what_they_mean_to_torch(inplace, device):
    logits, target = make(6, 37, torch.float32, ignored=False, device=device)
    target.clamp_(max=5)
    with torch.no_grad():
        logits[:, 6] = float("-inf")
        logits[1], logits[2, 3], logits[3, 36] = float("-inf"), float("inf"), float("nan")
    ones = torch.ones(6, device=device)
    options = {"reduction": "none"}
    found = with_grad(cross_entropy(logits * 1, target, inplace=inplace, **options), logits, ones)
    expected = with_grad(F.cross_entropy(logits, target, **options), logits, ones)
    assert found[0].isnan().tolist() == [False, True, True, True, False, False]
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    healthy = [0, 4, 5]
    torch.testing.assert_close(found[1][healthy], expected[1][healthy])
    assert found[1][[1, 2, 3], target[[1, 2, 3]]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 3, 4)])
def test_any_number_of_dimensions_strides_and_label_types(lead, dtype, device):
    base = torch.randn(*lead, 2 * 11, device=device).to(dtype)
    target = torch.randint(0, 11, lead, device=device)
    padded = torch.randn(*lead, 16, device=device).to(dtype)
    shifted = torch.randn(target.numel() * 11 + 1, device=device).to(dtype)[1:].view(*lead, 11)  # misaligned
    for logits in (base[..., ::2], padded[..., 2:13], shifted, base[..., :1].expand(*lead, 11)):
        logits = logits.detach().requires_grad_()
        plain = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        upstream = torch.randn(lead, device=device, dtype=torch.promote_types(dtype, torch.float32))
        expected = with_grad(cross_entropy(plain, target, reduction="none"), plain, upstream)
        for kind in (torch.int64, torch.int32, torch.uint8):
            found = with_grad(cross_entropy(logits, target.to(kind), reduction="none"), logits, upstream)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_logits_stay_and_a_second_backward_is_equal(device):
    logits, target = make(dtype=torch.float32, device=device)
    before = logits.detach().clone()
    loss = cross_entropy(logits, target, softcap=5.0)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(logits, before)


def test_only_float64_can_be_differentiated_twice():
    logits, target = make(dtype=torch.float32)
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        grad.sum().backward()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_by_bit_whatever_the_number_of_threads(softcap, dtype):
    logits, target = make(130, 2051, dtype)
    weight = torch.rand(2051)

    def run():
        options = {"softcap": softcap, "weight": weight, "label_smoothing": 0.1}
        plain = with_grad(cross_entropy(logits, target, **options), logits)
        return (*plain, *with_grad(cross_entropy(logits * 1, target, inplace=True, **options), logits))

    threads = torch.get_num_threads()
    once = run()
    try:
        for number in (threads, 1, 2, 3):
            torch.set_num_threads(number)
            assert all(torch.equal(one, other) for one, other in zip(once, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_instruction_sets_give_the_same_bits():
    # From integers: the bits of torch's own normal numbers depend on the instruction set.
    code = (
        "import hashlib, torch; o = torch.ops.fasttune; import fasttune.ops\n"
        "g = torch.Generator().manual_seed(0); h = hashlib.sha256()\n"
        "draw = lambda *shape: torch.randint(-999, 999, shape, generator=g) / 128\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "  for options in ((0.0, 0.0, 0.0), (0.1, 7.0, 0.1), (0.1, 0.0, 0.1), (0.0, 7.0, 0.0)):\n"
        "    x = draw(7, 1237).to(dtype); x[0, :5] = float('-inf')\n"
        "    y, w, f = torch.arange(7), draw(1237).abs(), torch.tensor(0.3)\n"
        "    loss, stats = o.cross_entropy_rows(x, y, w, 3, *options)\n"
        "    grad = o.cross_entropy_rows_backward(x, y, stats, f, w, 3, *options)\n"
        "    both = o.cross_entropy_grad_(x, y, f, w, 3, *options)\n"
        "    for t in (loss, stats, grad, x, *both): h.update(t.float().numpy().tobytes())\n"
        "print(fasttune.ops.build_info()['cpu'], h.hexdigest())\n"
    )
    found = {}
    for wanted in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": wanted}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        capability, digest = run.stdout.decode().split()
        found[capability] = digest
    assert "default" in found
    assert len(set(found.values())) == 1, found


def test_autocast_does_not_lower_the_arithmetic(device):
    logits, target = make(dtype=torch.float32, device=device)
    options = {"weight": torch.rand(507, device=device), "label_smoothing": 0.1}
    plain = with_grad(cross_entropy(logits, target, **options), logits)
    with torch.autocast(device, torch.bfloat16):
        cast = with_grad(cross_entropy(logits, target, **options), logits)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
