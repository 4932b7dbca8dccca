"""The reference of cross-entropy, against torch where their options overlap and against the formula elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttune.ops import backend, cross_entropy


def make(rows: int = 123, classes: int = 507, dtype=torch.float64, ignored: bool = True):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    if ignored:
        target[::3] = -100
    return logits.requires_grad_(), target


def with_grad(loss, logits, upstream=None):
    return loss, torch.autograd.grad(loss, logits, upstream)[0]


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


@pytest.mark.parametrize(
    ("dtype", "epsilon"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)]
)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_error_is_at_most_that_of_torch(dtype, epsilon, size):
    logits, target = make()
    logits = (logits * size).detach().to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    truth = with_grad(F.cross_entropy(wide, target) * 3, wide)
    ours = with_grad(cross_entropy(logits, target) * 3, logits)
    theirs = with_grad(F.cross_entropy(logits, target) * 3, logits)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        allowed = (other.double() - exact).norm() / exact.norm() + epsilon
        assert (mine.double() - exact).norm() / exact.norm() <= allowed


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_gradient_of_a_confident_target_keeps_its_digits(p):
    # Liger-Kernel#1329: p rounded to bfloat16 before subtracting 1 is wrong by 20 % at p = 0.99.
    logits = torch.tensor([[p / (1 - p), 1.0]], dtype=torch.float64).log().bfloat16().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(wide, torch.tensor([0])), wide)
    (found,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])), logits)
    # One rounding to 8 bits is 2^-9 relative.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)


def test_a_common_offset_costs_no_digits():
    # With lse - z_y, 1e4 in every logit would leave three digits of a small loss in float32.
    logits = torch.tensor([[8.0, 0.0, -1.0]])
    target = torch.tensor([0])
    torch.testing.assert_close(
        cross_entropy(logits + 8192, target), cross_entropy(logits, target), rtol=1e-6, atol=0
    )


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
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: cross_entropy(x, target, reduction=reduction, **options), logits
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_without_supervised_rows_loss_and_gradient_are_zero(reduction, rows):
    logits, _ = make(rows=rows, classes=7)
    target = torch.full((rows,), -100)
    loss, grad = with_grad(cross_entropy(logits, target, reduction=reduction, z_loss=0.1).sum(), logits)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(logits))


def test_ignored_rows_have_gradient_zero_whatever_they_hold():
    logits, target = make(rows=6, classes=7, dtype=torch.float32)
    expected = with_grad(cross_entropy(logits, target, softcap=5.0), logits)
    with torch.no_grad():
        logits[0], logits[3] = float("nan"), float("-inf")
    found = with_grad(cross_entropy(logits, target, softcap=5.0), logits)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not found[1][::3].any()


def test_masked_classes_may_be_minus_infinity():
    logits, target = make(rows=6, classes=7, dtype=torch.float32, ignored=False)
    target.clamp_(max=5)
    with torch.no_grad():
        logits[:, 6] = float("-inf")
    found = with_grad(cross_entropy(logits, target), logits)
    expected = with_grad(F.cross_entropy(logits, target), logits)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_divisor_makes_accumulation_exact():
    logits, target = make(rows=30, classes=11)
    target[:7] = -100
    count = (target >= 0).sum()
    whole = with_grad(cross_entropy(logits, target), logits)
    for divisor in (int(count), float(count), count, count.double().reshape(1)):
        parts = zip(logits.split(7), target.split(7), strict=True)
        loss = sum(cross_entropy(one, label, divisor=divisor) for one, label in parts)
        for mine, other in zip(with_grad(loss, logits), whole, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    assert cross_entropy(logits, torch.full_like(target, -100), divisor=0) == 0


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 3, 4)])
def test_any_number_of_dimensions_strides_and_label_types(lead):
    wide = torch.randn(*lead, 2 * 11, dtype=torch.float64)
    target = torch.randint(0, 11, lead)
    flat = F.cross_entropy(wide[..., ::2].reshape(-1, 11), target.reshape(-1), reduction="none").reshape(lead)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        found = cross_entropy(wide[..., ::2], target.to(dtype), reduction="none")
        torch.testing.assert_close(found, flat)


def test_logits_stay_and_a_second_backward_is_equal():
    logits, target = make(dtype=torch.float32)
    before = logits.detach().clone()
    loss = cross_entropy(logits, target, softcap=5.0)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(logits, before)


def test_autocast_does_not_lower_the_arithmetic():
    logits, target = make(dtype=torch.float32)
    options = {"weight": torch.rand(507), "label_smoothing": 0.1}
    plain = with_grad(cross_entropy(logits, target, **options), logits)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_grad(cross_entropy(logits, target, **options), logits)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_label_out_of_range_names_row_and_range(label):
    logits, target = make(rows=6, classes=7)
    target[4] = label
    with pytest.raises(IndexError, match=rf"label {label} in row 4 is out of range: expected \[0, 7\)"):
        cross_entropy(logits, target)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="in row 4 is out of range"):
        compiled(logits, target)


def test_ignore_index_may_be_a_class():
    logits, target = make(rows=40, classes=5, ignored=False)
    found = cross_entropy(logits, target, ignore_index=2)
    torch.testing.assert_close(found, F.cross_entropy(logits, target, ignore_index=2))


def test_opcheck_of_the_label_check():
    torch.library.opcheck(torch.ops.fasttune.checked_labels, (torch.tensor([1, -100, 3]), 4, -100))


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


def test_backend_is_the_reference():
    assert backend("cross_entropy", torch.ones(2, 3)).name == "reference"
