"""Linear cross entropy against the unfused form in float64, whatever the chunks, options and gradients wanted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fasttune.ops import backend, cross_entropy, library, linear_cross_entropy
from fasttune.ops.linear_cross_entropy import chunk_rows

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
CHUNKS = [None, 1, 50_000]
"""Bytes: all rows at once; one at a time; 24 or 49 rows, the last chunk smaller."""
fasttune = torch.ops.fasttune


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def make(rows=123, features=36, classes=507, dtype=torch.float32, device="cpu", ignored=True):
    """hidden, weight, bias and target; every third row ignored."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((rows, features), (classes, features), (classes,))
    tensors = [
        torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, (1, 0.5, 1), strict=True)
    ]
    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    if ignored:
        target[::3] = -100
    return *(tensor.to(device, dtype).requires_grad_() for tensor in tensors), target


def doubles(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def unfused(hidden, weight, bias, target, *, class_weight=None, **options):
    return cross_entropy(F.linear(hidden, weight, bias), target, weight=class_weight, **options)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [(torch.float64, 1e-15), (torch.float32, 2e-7), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)],
)
def test_error_is_at_most_that_of_torch(dtype, epsilon, biased, reduction, chunk_bytes, device):
    *inputs, target = make(dtype=dtype, device=device)
    inputs = inputs if biased else inputs[:2]
    upstream = torch.randn(123 if reduction == "none" else (), device=device)

    def gradients(inputs, loss):
        return loss, *torch.autograd.grad(loss, inputs, upstream.to(loss.dtype))

    def torch_(inputs):
        return gradients(inputs, F.cross_entropy(F.linear(*inputs), target, reduction=reduction))

    bias = inputs[2] if biased else None
    options = {"reduction": reduction, "bias": bias, "chunk_bytes": chunk_bytes}
    found = gradients(inputs, linear_cross_entropy(inputs[0], inputs[1], target, **options))
    for mine, other, exact in zip(found, torch_(inputs), torch_(doubles(*inputs)), strict=True):
        assert error(mine, exact) <= error(other, exact) + epsilon
    assert [one.dtype for one in found[1:]] == [dtype] * len(inputs)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [1, 7, 252])
def test_options_jointly(chunk_bytes, softcap, weighted, reduction, classes, device):
    *inputs, target = make(rows=31, classes=classes, device=device)
    options = {"softcap": softcap, "label_smoothing": 0.1, "z_loss": 0.05, "reduction": reduction}
    options["class_weight"] = torch.rand(classes, device=device) if weighted else None
    upstream = torch.randn(31 if reduction == "none" else (), device=device)
    wide = doubles(*inputs)
    exact = unfused(*wide, target, **options)
    hidden, weight, bias = inputs
    found, lse = linear_cross_entropy(
        hidden, weight, target, bias=bias, return_lse=True, chunk_bytes=chunk_bytes, **options
    )
    truth = torch.autograd.grad(exact, wide, upstream.double())
    # A gradient is a sum over rows and classes of differences of numbers of its upstream's size.
    for mine, other in zip(torch.autograd.grad(found, inputs, upstream), truth, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6 * max(1, upstream.norm().item()) * 5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    logits = F.linear(*wide)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.where(target >= 0, capped.logsumexp(-1), 0.0)
    torch.testing.assert_close(lse.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert not lse.requires_grad


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_gradients_wanted_are_computed(wanted, reduction, device):
    *inputs, target = make(device=device)
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    hidden, weight, bias = inputs
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction).sum()
    expected = unfused(*inputs, target, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
        found = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        expected.backward()
        for mine, tensor in zip(found, inputs, strict=True):
            assert (mine is None) == (tensor.grad is None)
            if mine is not None:
                torch.testing.assert_close(mine, tensor.grad, rtol=1e-5, atol=1e-5)
    sizes = [x.numel() for x in fasttune.linear_cross_entropy_grad(
        *(x.detach() for x in inputs), target, torch.ones((), device=device), None, -100, 0.0, 0.0, 0.0,
        [bool(want) for want in wanted], None)[2:]]  # fmt: skip
    assert sizes == [x.numel() if want else 0 for x, want in zip(inputs, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_without_supervised_rows_loss_and_gradients_are_zero(rows, reduction, dtype, device):
    *inputs, _ = make(rows=rows, dtype=dtype, device=device)
    target = torch.full((rows,), -100, device=device)
    hidden, weight, bias = inputs
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, z_loss=0.1)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert not loss.any()
    for grad, of in zip(torch.autograd.grad(loss.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_what_an_ignored_row_holds_does_not_matter(device):
    hidden, weight, _, target = make(device=device)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    poisoned = hidden.detach().clone()
    poisoned[0], poisoned[3] = float("nan"), float("inf")
    poisoned.requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(poisoned, weight, target), (poisoned, weight))
    assert torch.equal(found[0], expected[0])
    if device == "cpu":  # elsewhere the row takes part in the product for dW, as it does in PyTorch's own
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_shift_predicts_the_next_token_of_the_same_sequence(reduction, chunk_bytes, device):
    hidden, weight, _, _ = make(rows=4 * 9, device=device)
    hidden = hidden.detach().view(4, 9, 36).requires_grad_()
    target = torch.randint(0, 507, (4, 9), device=device)
    target[1, 3:6] = -100
    options = {"reduction": reduction, "chunk_bytes": chunk_bytes}
    loss = linear_cross_entropy(hidden, weight, target, shift=True, **options)
    logits = F.linear(hidden, weight)[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), target[:, 1:], reduction=reduction)
    if reduction == "none":
        assert not loss[:, -1].any()
        torch.testing.assert_close(loss[:, :-1], expected)
    else:
        torch.testing.assert_close(loss, expected)
    upstream = torch.randn(4, 8, device=device) if reduction == "none" else torch.tensor(2.0, device=device)
    padded = F.pad(upstream, (0, 1), value=7.0) if reduction == "none" else upstream
    found = torch.autograd.grad(loss, (hidden, weight), padded)
    for mine, other in zip(found, torch.autograd.grad(expected, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert not found[0][:, -1].any()
    empty = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert linear_cross_entropy(hidden[:2, :0], weight, empty, shift=True) == 0


def test_a_tied_weight_gets_both_gradients(device):
    _, weight, _, target = make(rows=40, classes=252, device=device)
    tokens = torch.randint(0, 252, (40,), device=device)
    found = torch.autograd.grad(linear_cross_entropy(F.embedding(tokens, weight), weight, target), weight)
    expected = torch.autograd.grad(F.cross_entropy(F.embedding(tokens, weight) @ weight.t(), target), weight)
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_dimensions_strides_and_label_types(dtype, device):
    _, weight, _, _ = make(classes=11, dtype=dtype, device=device)
    turned = weight.detach().t().contiguous().t()
    for lead in ((), (4,), (2, 3)):
        hidden = torch.randn(*lead, 80, device=device).to(dtype)[..., 3:75:2].requires_grad_()
        target = torch.randint(0, 11, lead, device=device)
        expected = cross_entropy(F.linear(hidden, weight), target, reduction="none")
        for kind, w in ((torch.int64, weight), (torch.int32, turned), (torch.uint8, weight)):
            found = linear_cross_entropy(hidden, w, target.to(kind), reduction="none")
            assert found.shape == lead
            # bfloat16: the logits of one GEMM and of another may differ by one rounding of 2^-9.
            tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    hidden, weight, bias, target = make(5, 4, 7, torch.float64)

    def function(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, target, bias=bias, reduction=reduction, softcap=3.0, z_loss=0.1
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_second_backward(device):
    hidden, weight, _, target = make(device=device)
    inputs = (hidden, weight)
    loss = linear_cross_entropy(hidden, weight, target)
    torch.autograd.grad(loss, inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="the first one handed out the gradients"):
        torch.autograd.grad(loss, inputs)
    loss = linear_cross_entropy(hidden, weight, target, reduction="none").sum()
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
        with pytest.raises(NotImplementedError, match="once, not twice"):
            torch.autograd.grad(loss, inputs, create_graph=True)


def test_gradients_are_the_parameters_own(device):
    # Handed out, not copied; and adding to one of them leaves the next step's alone.
    hidden, weight, _, target = make(device=device)
    for _ in range(2):
        linear_cross_entropy(hidden, weight, target).backward()
    twice = weight.grad.clone()
    weight.grad = None
    linear_cross_entropy(hidden, weight, target).backward()
    torch.testing.assert_close(twice, 2 * weight.grad)


def test_repeats_bit_by_bit(device):
    *inputs, target = make(dtype=torch.bfloat16, device=device)
    hidden, weight, bias = inputs

    def run():
        loss = linear_cross_entropy(hidden, weight, target, bias=bias, chunk_bytes=50_000)
        return loss, *torch.autograd.grad(loss, inputs)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_autocast_takes_hidden_weight_and_bias_to_its_dtype(device):
    hidden, weight, bias, target = make(device=device)
    with torch.autocast(device, torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, target, bias=bias)
    short = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    expected = linear_cross_entropy(short[0], short[1], target, bias=short[2])
    assert torch.equal(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found, (hidden, weight, bias)), torch.autograd.grad(expected, short), strict=True
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other.float())


def test_checkpointing(device):
    hidden, weight, _, target = make(device=device)

    def block(hidden):
        return linear_cross_entropy(hidden.tanh(), weight, target)

    plain = torch.autograd.grad(block(hidden), (hidden, weight))
    again = torch.autograd.grad(checkpoint(block, hidden, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole(reduction, upstream, compiler, device):
    *inputs, target = make(dtype=torch.bfloat16, device=device)
    upstream = torch.full((123,) if reduction == "none" else (), upstream, device=device)

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden * 2, weight, target, bias=bias, reduction=reduction, softcap=9.0)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)(*inputs)
    eager = function(*inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    found, again = (torch.autograd.grad(compiled, inputs, upstream, retain_graph=True) for _ in range(2))
    for mine, second, other in zip(found, again, torch.autograd.grad(eager, inputs, upstream), strict=True):
        assert torch.equal(mine, second)
        torch.testing.assert_close(mine, other)


def test_opcheck(device):
    hidden, weight, bias, target = make(9, 5, 7, device=device)
    options, factor = (torch.rand(7, device=device), -100, 0.1, 5.0, 0.1), torch.tensor(0.3, device=device)
    torch.library.opcheck(
        fasttune.linear_cross_entropy_rows, (hidden, weight, bias, target, *options, None), rtol=1e-4, atol=1e-5
    )
    for wanted in ([True, True, True], [True, False, False]):
        inputs = [x if want else x.detach() for x, want in zip((hidden, weight, bias), wanted, strict=True)]
        torch.library.opcheck(fasttune.linear_cross_entropy_grad, (*inputs, target, factor, *options, wanted, 60))


def test_liger_512_827_a_16_bit_weight_gradient_is_summed_in_float32(device):
    # A positive mean in hidden makes the chunks' contributions add up: a bfloat16 sum of 256 stops growing.
    hidden, weight, _, target = make(rows=1024, classes=16, dtype=torch.bfloat16, device=device, ignored=False)
    hidden = (hidden.detach() + 3).requires_grad_()
    wide = doubles(hidden, weight)
    (exact,) = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target), wide[1])
    errors = []
    for chunk_bytes in (2**20, 4 * 16 * 2):
        loss = linear_cross_entropy(hidden, weight, target, chunk_bytes=chunk_bytes)
        errors.append(error(torch.autograd.grad(loss, weight)[0], exact))
    # 256 contributions, each rounded once: independent errors of 2^-9 at most.
    assert errors[1] <= errors[0] + 2**-9


def test_ml_cross_entropy_52_bias_is_added_and_no_loss_is_negative(device):
    hidden, weight, bias, target = make(device=device)
    loss = linear_cross_entropy(hidden, weight, target, bias=30 * bias, reduction="none")
    assert (loss >= 0).all()
    exact = F.cross_entropy(F.linear(*doubles(hidden, weight, 30 * bias)), target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
def test_unsloth_2319_1265_no_option_leaves_the_fast_path():
    hidden, weight, bias, target = make()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    for options in ({"bias": bias}, {"softcap": 5.0}, {"class_weight": torch.rand(507)}, {"label_smoothing": 0.1},
                    {"z_loss": 0.1}, {"shift": True}, {"divisor": 7}, {"return_lse": True}):  # fmt: skip
        names: list[str] = []
        with Names():
            linear_cross_entropy(hidden, weight, target, **options)
        assert "fasttune::linear_cross_entropy_grad" in names
        assert not {"aten::linear", "aten::mm", "aten::addmm"} & set(names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (4, 8)])
def test_accumulation_with_a_divisor_is_exact(dtype, shape, device):
    hidden, weight, _, target = make(rows=32, dtype=dtype, device=device)
    whole = linear_cross_entropy(hidden, weight, target)
    expected = torch.autograd.grad(whole, (hidden, weight))
    count = (target >= 0).sum()
    parts = zip(hidden.split(8), target.split(8), strict=True)
    loss = sum(linear_cross_entropy(one, weight, label, divisor=count) for one, label in parts)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    # In bfloat16 autograd adds the four weight gradients, each rounded, in bfloat16.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for mine, other in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_label_out_of_range_names_row_and_range(dtype, chunk_bytes):
    hidden, weight, _, target = make(dtype=dtype)
    target[100] = 507
    with pytest.raises(IndexError, match=r"label 507 in row 100 is out of range: expected \[0, 507\)"):
        linear_cross_entropy(hidden, weight, target, chunk_bytes=chunk_bytes)


def test_chunks():
    weight = torch.empty(32000, 768, dtype=torch.bfloat16, device="meta")
    assert chunk_rows(10**6, weight, False, None) == 512
    assert chunk_rows(100, weight, False, None) == 100
    assert chunk_rows(0, weight, False, None) == 1
    assert chunk_rows(1024, weight, True, None) == 1024  # 64 MB of logits save a float32 sum of 98
    assert chunk_rows(4096, weight, True, None) == 512
    assert chunk_rows(1024, weight.float(), True, None) == 512
    assert chunk_rows(10**6, weight, True, 10 * 64000 + 5) == 10
    assert chunk_rows(10**6, weight, True, 1) == 1
    assert chunk_rows(10**6, torch.empty(262144, 8, device="meta"), False, None) == 256


@pytest.mark.parametrize(
    ("changed", "error_type", "message"),
    [
        ({"hidden": torch.ones(6, 4, dtype=torch.int64)}, TypeError, r"^hidden: .* found torch\.int64"),
        ({"hidden": torch.ones(6, 5)}, ValueError, r"^hidden: expected shape \[\.\.\., 4\] .* found \[6, 5\]"),
        ({"weight": torch.ones(4)}, ValueError, r"^weight: expected shape \[V, H\] .* found \[4\]"),
        ({"weight": torch.ones(7, 4).half()}, TypeError, r"^weight: .* torch\.float32, found torch\.float16"),
        ({"bias": torch.ones(6)}, ValueError, r"^bias: expected shape \[7\] .* found \[6\]"),
        ({"bias": torch.ones(7).double()}, TypeError, r"^bias: .* torch\.float32, found torch\.float64"),
        (
            {"target": torch.ones(5, dtype=torch.int64)},
            ValueError,
            r"^target: expected shape \[6\] .* found \[5\]",
        ),
        ({"target": torch.ones(6)}, TypeError, r"^target: .* found torch\.float32"),
        ({"class_weight": torch.ones(6)}, ValueError, r"^class_weight: expected shape \[7\], found \[6\]"),
        ({"chunk_bytes": 0}, ValueError, r"^chunk_bytes: .* found 0"),
        ({"softcap": -1.0}, ValueError, r"^softcap: .* found -1"),
        ({"divisor": 3, "reduction": "none"}, ValueError, r"^divisor: expected None with reduction 'none'"),
        (
            {"hidden": torch.ones(4), "target": torch.tensor(1), "shift": True},
            ValueError,
            r"^shift: expected target of shape \[\.\.\., time\], found \[\]",
        ),
    ],
)
def test_errors_name_the_argument(changed, error_type, message):
    target = torch.ones(6, dtype=torch.int64)
    arguments = {"hidden": torch.ones(6, 4), "weight": torch.ones(7, 4), "target": target, **changed}
    with pytest.raises(error_type, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
def test_backend_tells_who_runs_it_and_why_not():
    hidden, weight, bias, target = make()
    found = backend("linear_cross_entropy", hidden, weight, target, bias)
    assert found.name == "cpu"
    assert found.why.startswith("PyTorch's GEMMs around the compiled cross entropy")
    assert backend("linear_cross_entropy", hidden.double()).name == "reference"
