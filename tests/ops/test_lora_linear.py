"""The linear layer with a low-rank adapter, against the plain composition and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fasttune.ops import backend, cross_entropy, dropout, lora_linear
from fasttune.ops.dropout import mask_reference
from fasttune.ops.lora_linear import lora_linear_reference

SEED = torch.tensor(424242)
INS, OUTS, RANK = 123, 252, 5


def make(*lead: int, dtype=torch.float64, adapter=None, bias=True, ins=INS, outs=OUTS, rank=RANK):
    """x [*lead, in], weight, bias, lora_a, lora_b: x and the adapter want gradients."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape, like=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like)

    x = random(*lead, ins).requires_grad_()
    weight = (random(outs, ins) / ins**0.5).to(dtype)
    a = (random(rank, ins, like=adapter or dtype) / ins**0.5).requires_grad_()
    b = random(outs, rank, like=adapter or dtype).requires_grad_()
    return x, weight, random(outs) if bias else None, a, b


def low_level(x, weight, bias, a, b, scale=0.7, p=0.3, seed=SEED):
    return torch.ops.fasttune.lora_linear(x, weight, bias, a, b, scale, p, seed)[0]


def grads(y, wanted, upstream):
    return torch.autograd.grad(y, wanted, upstream)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_float64_is_the_plain_composition(p, bias):
    x, weight, b0, a, b = make(77, bias=bias)
    upstream = torch.randn(77, OUTS, dtype=torch.float64)
    seed = SEED if p > 0 else None
    ours = low_level(x, weight, b0, a, b, 0.7, p, seed)
    theirs = lora_linear_reference(x, weight, b0, a, b, 0.7, p, seed)
    # 1e-12: sums of 252 terms in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(grads(ours, (x, a, b), upstream), grads(theirs, (x, a, b), upstream), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x, weight, bias, a, b = make(6, ins=4, outs=3, rank=2)

    def run(x, a, b):
        torch.manual_seed(5)
        return lora_linear(x, weight, bias, a, b, scale=1.7, dropout=p, training=True)

    assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.parametrize(
    ("dtype", "epsilon"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)]
)
@pytest.mark.parametrize("adapter", [None, torch.float32])
def test_error_is_at_most_that_of_pytorchs_ops(dtype, epsilon, adapter):
    """Relative to float64 on the same numbers and mask, in norm; epsilon is about a tenth of dtype's own."""
    x, weight, bias, a, b = make(507, dtype=dtype, adapter=adapter)
    upstream = torch.randn(507, OUTS).to(dtype)

    def all_of(function, *arguments):
        x, _, _, a, b = arguments
        y = function(*arguments, 0.7, 0.3, SEED)
        return y, *grads(y, (x, a, b), upstream.to(y.dtype))

    exact = all_of(lora_linear_reference, *(t.detach().double().requires_grad_(t.requires_grad)
                                            for t in (x, weight, bias, a, b)))  # fmt: skip
    ours = all_of(low_level, x, weight, bias, a, b)
    theirs = all_of(lora_linear_reference, x, weight, bias, a, b)
    assert [t.dtype for t in ours] == [dtype, dtype, adapter or dtype, adapter or dtype]
    for mine, reference, truth in zip(ours, theirs, exact, strict=True):
        allowed = (reference.double() - truth).norm() / truth.norm() + epsilon
        assert (mine.double() - truth).norm() / truth.norm() <= allowed


@pytest.mark.parametrize("lead", [(), (1,), (17,), (3, 5), (2, 3, 4), (0,), (2, 0)])
def test_any_number_of_dimensions(lead):
    x, weight, bias, a, b = make(*lead)
    y = lora_linear(x, weight, bias, a, b, scale=0.5)
    assert y.shape == (*lead, OUTS)
    torch.testing.assert_close(y, F.linear(x, weight + 0.5 * b @ a, bias), rtol=1e-10, atol=1e-10)
    torch.manual_seed(0)
    y = lora_linear(x, weight, bias, a, b, scale=0.5, dropout=0.2, training=True)
    y.backward(torch.randn_like(y))
    assert [t.grad.shape for t in (x, a, b)] == [x.shape, a.shape, b.shape]
    if 0 in lead:
        assert not a.grad.any()


def test_strides_change_nothing():
    x, weight, bias, a, b = make(30, 40)
    wide = torch.randn(40, 30, 2 * INS, dtype=torch.float64)
    for strided in (x.detach().transpose(0, 1), wide[..., ::2], wide[..., :INS], wide[0, :, :INS]):
        results = []
        for value in (strided, strided.contiguous()):
            leaf = value.detach().requires_grad_()
            torch.manual_seed(2)
            y = lora_linear(leaf, weight, bias, a, b, scale=1.1, dropout=0.3, training=True)
            results.append((y, *grads(y.transpose(0, -1), (leaf, a, b), torch.ones_like(y).transpose(0, -1))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dropped_elements_get_no_gradient_from_the_adapter():
    x, weight, _, a, b = make(57)
    (dx,) = grads(low_level(x, torch.zeros_like(weight), None, a, b), x, torch.randn(57, OUTS).double())
    assert torch.equal(dx != 0, mask_reference(x.shape, 0.3, SEED))


def test_saved_are_x_and_what_is_as_thin_as_the_rank():
    x, weight, bias, a, b = make(400)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, a, b, scale=1.0, dropout=0.1, training=True)
    there = {t.data_ptr() for t in (x, weight, a, b)}
    assert sorted(t.numel() for t in saved if t.data_ptr() not in there) == [1, 400 * RANK]


def test_only_wanted_gradients_are_computed():
    x, weight, bias, a, b = make(9)
    with torch.no_grad():
        _, low = torch.ops.fasttune.lora_linear(x, weight, bias, a, b, 1.0, 0.3, SEED)
        dy = torch.randn(9, OUTS, dtype=torch.float64)
        run = torch.ops.fasttune.lora_linear_backward
        every = run(dy, x, low, weight, a, b, 1.0, 0.3, SEED, [True] * 3)
        for i in range(3):
            some = run(dy, x, low, weight, a, b, 1.0, 0.3, SEED, [j == i for j in range(3)])
            assert [t.numel() > 0 for t in some] == [j == i for j in range(3)]
            assert torch.equal(some[i], every[i])
    y = lora_linear(x.detach(), weight, bias, a.detach(), b, scale=1.0, dropout=0.3, training=True)
    y.sum().backward()
    assert x.grad is None
    assert a.grad is None
    assert b.grad is not None


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_trained_base_gets_its_gradients_and_backend_says_so(p):
    x, weight, bias, a, b = make(31)
    torch.manual_seed(6)
    frozen = lora_linear(x, weight, bias, a, b, scale=0.7, dropout=p, training=True)
    upstream = torch.randn_like(frozen)
    expected = grads(frozen, (x, a, b), upstream)
    weight.requires_grad_()
    bias.requires_grad_()
    assert backend("lora_linear", x, weight, bias, a, b).name == "reference"
    torch.manual_seed(6)
    y = lora_linear(x, weight, bias, a, b, scale=0.7, dropout=p, training=True)
    found = grads(y, (x, a, b, weight, bias), upstream)
    for mine, other in zip(found, (*expected, upstream.t() @ x, upstream.sum(0)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
    with pytest.raises(NotImplementedError, match="weight and bias"):
        low_level(x, weight, bias, a, b).sum().backward()


def test_second_backward_is_equal_and_second_order_is_refused():
    x, weight, bias, a, b = make(19, dtype=torch.float32)
    y = lora_linear(x, weight, bias, a, b, scale=0.7, dropout=0.3, training=True)
    upstream = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, (x, a, b), upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    (dx,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        dx.sum().backward()


def test_autocast_computes_in_its_dtype():
    x, weight, bias, a, b = make(20, 4, dtype=torch.float32)
    results = []
    for cast in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = lora_linear(x, weight, bias, a, b, scale=0.7, dropout=0.3, training=True)
        results.append((y, *grads(y, (x, a, b), torch.ones_like(y))))
    (plain, *_), (cast_y, *cast_grads) = results
    assert cast_y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in cast_grads)
    for one, other in zip(*results, strict=True):
        # bfloat16 has 8 bits: each of the few roundings on the way is 2^-9 relative.
        assert (one - other.float()).norm() <= 2**-7 * one.norm()
    assert plain.dtype == torch.float32


def test_checkpointing_recomputes_the_mask():
    x, weight, bias, a, b = make(33, dtype=torch.float32)

    def block(x):
        return lora_linear(x.tanh(), weight, bias, a, b, scale=0.7, dropout=0.3, training=True).square().sum()

    torch.manual_seed(8)
    plain = torch.autograd.grad(block(x), (x, a, b))
    torch.manual_seed(8)
    recomputed = torch.autograd.grad(checkpoint(block, x, use_reentrant=False), (x, a, b))
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def step(x, weight, bias, a, b, target):
    y = lora_linear(x, weight, bias, a, b, scale=0.7, dropout=0.3, training=True)
    return cross_entropy(dropout(y, 0.2, training=True), target, label_smoothing=0.1)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_all_ops_compile_without_graph_break(compiler):
    x, weight, bias, a, b = make(12, 7, dtype=torch.float32)
    target = torch.randint(0, OUTS, (12, 7))
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    results = []
    for function in (step, compiled):
        torch.manual_seed(9)
        loss = function(x, weight, bias, a, b, target)
        results.append((loss, *torch.autograd.grad(loss, (x, a, b))))
    torch.manual_seed(9)
    again = compiled(x, weight, bias, a, b, target)
    assert torch.equal(again, results[1][0])
    assert not torch.equal(compiled(x, weight, bias, a, b, target), again)
    if compiler == "aot_eager":  # inductor has a generator of its own: the masks are others
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_compiled_autograd_takes_the_backward():
    """What autograd in C++ may hold is limited there: no result that is marked as not differentiable."""
    from torch._dynamo import compiled_autograd

    x, weight, bias, a, b = make(19, dtype=torch.float32)
    results = []
    for compiled in (False, True):
        torch.manual_seed(3)
        y = lora_linear(x, weight, bias, a, b, scale=0.7, dropout=0.3, training=True)
        x.grad = a.grad = b.grad = None
        if compiled:
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                y.square().sum().backward()
        else:
            y.square().sum().backward()
        results.append((x.grad, a.grad, b.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_backward_has_the_mask_of_the_compiled_forward():
    def run(x):
        return dropout(x * 2, 0.4, training=True)

    x = torch.rand(50, 50).add(1).requires_grad_()
    y = torch.compile(run, fullgraph=True)(x)
    y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0)


def test_opcheck():
    x, weight, bias, a, b = make(6, ins=4, outs=3, rank=2, dtype=torch.float32)
    torch.library.opcheck(torch.ops.fasttune.lora_linear, (x, weight, bias, a, b, 0.7, 0.3, SEED))
    arguments = [t.detach() for t in (torch.randn(6, 3), x, torch.randn(6, 2), weight, a, b)]
    backward = torch.ops.fasttune.lora_linear_backward
    torch.library.opcheck(backward, (*arguments, 0.7, 0.0, None, [True, False, True]))


def shapes(**changed):
    x, weight, bias, a, b = make(6, dtype=torch.float32)
    return {"x": x, "weight": weight, "bias": bias, "lora_a": a, "lora_b": b, "scale": 1.0, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(6, 9)}, r"^x: expected shape \[..., 123\] to fit weight, found \[6, 9\]"),
        ({"x": torch.ones(())}, r"^x: expected shape \[..., 123\] to fit weight, found \[\]"),
        ({"weight": torch.ones(9)}, r"^weight: expected shape \[out, in\], found \[9\]"),
        ({"bias": torch.ones(9)}, r"^bias: expected shape \[252\] to fit weight, found \[9\]"),
        ({"lora_a": torch.ones(5, 9)}, r"^lora_a: expected shape \[r, 123\] to fit weight, found \[5, 9\]"),
        ({"lora_b": torch.ones(252, 4)}, r"^lora_b: expected shape \[252, 5\] .* found \[252, 4\]"),
        ({"lora_a": torch.ones(5, 123, dtype=torch.int64)}, r"^lora_a: expected float64.*found torch.int64"),
        (
            {"weight": torch.ones(252, 123).half()},
            r"^weight: expected x's dtype torch.float32, found torch.float16",
        ),
        ({"dropout": 1.5}, r"^dropout: expected a probability in \[0, 1\], found 1.5"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(**shapes(**changed))
