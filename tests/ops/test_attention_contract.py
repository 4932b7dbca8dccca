"""Attention: what surrounds the numbers. Dropout's mask, bits, autograd, compilers, memory, messages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fasttune.ops import attention, backend, library
from fasttune.ops.attention import attention_reference
from fasttune.ops.dropout import mask_reference

KERNEL = backend("attention", torch.empty(0))
needs_kernel = pytest.mark.skipif(KERNEL.name == "reference", reason=f"no kernel: {KERNEL.why}")
DTYPES = [torch.float32, torch.bfloat16]
REFUSED = {dtype: library.OPS["attention"].refuses(torch.empty(0, dtype=dtype)) for dtype in DTYPES}
SEED = torch.tensor(424242)


def op(query, *rest):
    run = attention_reference if REFUSED[query.dtype] else torch.ops.fasttune.attention
    return run(query, *rest)


def make(b, h, shared, q, k, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return random(b, h, q, d), random(b, shared, k, d), random(b, shared, k, d)


# b, h, h/g, n. A head of 13 or 17 or 331 begins at any of the elements that one draw of random numbers serves; 331
# x 331 goes in two blocks.
SQUARES = [(1, 1, 1, 1), (3, 5, 5, 13), (5, 4, 2, 17), (1, 3, 3, 331), (1, 4, 1, 98)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", SQUARES, ids=str)
def test_the_mask_is_that_of_dropout_on_all_weights(size, p, dtype):
    """By values that are the identity the result is the dropped weights themselves; by a gradient that is the
    identity, that of the values is."""
    b, h, shared, n = size
    kept = mask_reference(torch.Size([b, h, n, n]), p, SEED)
    query, key, _ = make(b, h, shared, n, n, n, dtype=dtype)
    value = torch.eye(n).expand(b, shared, n, n).to(dtype).requires_grad_()
    out, _ = op(query, key, value, None, 0.01, p, SEED)
    assert torch.equal(out.transpose(1, 2) != 0, kept)
    # One query head at a time, or a key head's gradient would be the sum of its group.
    upstream = torch.zeros(b, n, h, n, dtype=dtype)
    for head in range(h):
        upstream.zero_()
        upstream[:, :, head] = torch.eye(n, dtype=dtype)
        (found,) = torch.autograd.grad(out, value, upstream, retain_graph=True)
        dropped = found[:, head // (h // shared)].transpose(1, 2)
        assert torch.equal(dropped != 0, kept[:, head])


def test_nothing_kept_gives_zeros_and_zero_gradients():
    inputs = make(2, 4, 2, 17, 13, 8)
    out = attention(*inputs, scale=0.3, dropout=1.0, training=True)
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


def test_dropout_is_for_training_and_repeats_by_torchs_seed():
    query, key, value = (tensor.detach() for tensor in make(2, 4, 2, 17, 13, 8))

    def run(seed, **options):
        torch.manual_seed(seed)
        return attention(query, key, value, scale=0.3, **options)

    plain = run(1)
    assert torch.equal(run(1, dropout=0.9), plain)
    assert torch.equal(run(1, dropout=0.0, training=True), plain)
    dropped = run(1, dropout=0.5, training=True)
    assert torch.equal(run(1, dropout=0.5, training=True), dropped)
    assert not torch.equal(run(2, dropout=0.5, training=True), dropped)
    again = attention(query, key, value, scale=0.3, dropout=0.5, training=True)
    assert not torch.equal(again, dropped)


def test_a_seed_without_probability_drops_nothing():
    inputs = [tensor.detach() for tensor in make(2, 4, 2, 17, 13, 8)]
    assert torch.equal(op(*inputs, None, 0.3, 0.0, SEED)[0], op(*inputs, None, 0.3, 0.0, None)[0])


def everything(size, dtype, mask=None):
    """Result and gradients, with dropout."""
    inputs = make(*size, dtype=dtype)
    upstream = torch.randn(size[0], size[3], size[1], size[5], generator=torch.Generator().manual_seed(2))
    out, _ = op(*inputs, mask, 0.3, 0.2, SEED)
    return out, *torch.autograd.grad(out, inputs, upstream.to(dtype))


# One block a key head; more key heads than threads; five blocks a key head.
BLOCKS = [(1, 2, 2, 98, 98, 32), (3, 12, 12, 98, 98, 32), (2, 3, 1, 257, 600, 64)]


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", BLOCKS, ids=str)
def test_bits_repeat_and_do_not_depend_on_the_threads(size, dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(everything(size, dtype))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


# Numbers by integers: torch.randn gives others on another instruction set.
EVERYTHING = """
import sys, torch
import fasttune.ops

def numbers(*shape, by):
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * by) % 2003 / 500 - 2).view(shape)

results = [fasttune.ops.build_info()["cpu"]]
for dtype in (torch.float32, torch.bfloat16):
    query, key, value = (numbers(2, 3, n, 32, by=by).to(dtype).requires_grad_()
                         for n, by in ((98, 7919), (257, 104729), (257, 1299709)))
    mask = numbers(2, 1, 1, 257, by=31).to(dtype)
    mask[0, ..., 200:] = torch.finfo(dtype).min
    out = fasttune.ops.attention(query, key, value, mask, scale=0.2)
    upstream = numbers(*out.shape, by=15485863).to(dtype)
    results += [out.detach(), *torch.autograd.grad(out, (query, key, value), upstream)]
torch.save(results, sys.argv[1])
"""


def elsewhere(path, **environment):
    subprocess.run([sys.executable, "-c", EVERYTHING, path], env={**os.environ, **environment}, check=True)
    return torch.load(path)


@needs_kernel
def test_every_instruction_set_gives_the_same_but_for_rounding(tmp_path):
    """Ours, that is: the products between are oneDNN's, which this variable does not reach."""
    sets = ("default", "avx2", "avx512")
    first, *others = (elsewhere(tmp_path / name, ATEN_CPU_CAPABILITY=name) for name in sets)
    assert first[0] == "default"
    for other in others:
        for one, two in zip(first[1:], other[1:], strict=True):
            # A weight is exp of a score up to about 8, itself rounded by 2^-21; of bfloat16's, a few are rounded
            # the other way for it.
            assert (one.double() - two).norm() <= (5e-7 if one.dtype == torch.float32 else 1e-3) * one.norm()


@needs_kernel
def test_where_onednn_has_no_products_the_reference_runs_and_backend_says_so(tmp_path):
    query = torch.ones(1, 1, 1, 1)
    with torch.backends.mkldnn.flags(enabled=False):
        found = backend("attention", query)
        assert found.name == "reference"
        assert "no small products of torch.float32" in found.why
        inputs = make(2, 4, 2, 17, 13, 8)
        expected = attention_reference(*inputs, None, 0.3, 0.0, None)[0]
        assert torch.equal(attention(*inputs, scale=0.3), expected)
        with pytest.raises(NotImplementedError, match="no small products of Float"):
            torch.ops.fasttune.attention(query, query, query, None, 1.0, 0.0, None)
    assert backend("attention", query).name == "cpu"
    # An older processor: oneDNN goes by what it is told.
    here, there = elsewhere(tmp_path / "here"), elsewhere(tmp_path / "there", ONEDNN_MAX_CPU_ISA="AVX2")
    for one, two in zip(here[1:], there[1:], strict=True):
        assert (one.double() - two).norm() <= (1e-6 if one.dtype == torch.float32 else 2e-2) * one.norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_backward_is_equal_and_second_order_is_refused(p):
    inputs = make(2, 4, 2, 17, 13, 8)
    out = attention(*inputs, scale=0.3, dropout=p, training=True)
    upstream = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    gradient, *_ = torch.autograd.grad(out, inputs, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        gradient.sum().backward()


def test_only_some_inputs_want_gradients():
    every = make(2, 4, 2, 17, 13, 8)
    expected = torch.autograd.grad(op(*every, None, 0.3, 0.2, SEED)[0].sum(), every)
    for i in range(3):
        inputs = [tensor if j == i else tensor.detach() for j, tensor in enumerate(every)]
        (found,) = torch.autograd.grad(op(*inputs, None, 0.3, 0.2, SEED)[0].sum(), inputs[i])
        assert torch.equal(found, expected[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_size_queries_by_keys_is_saved(dtype):
    if REFUSED[dtype]:
        pytest.skip(REFUSED[dtype])
    query, key, value = make(2, 4, 2, 98, 257, 8, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(query, key, value, scale=0.3, dropout=0.1, training=True)
    there = {tensor.data_ptr() for tensor in (query, key, value)}
    new = [tensor for tensor in saved if tensor.data_ptr() not in there]
    # The seed, and two float32 numbers a row of scores.
    assert sorted(tensor.numel() * tensor.itemsize for tensor in new) == [8, 2 * 4 * 98 * 2 * 4]


def test_checkpointing_recomputes_the_mask():
    inputs = make(2, 4, 2, 17, 13, 8)

    def block(query, key, value):
        return attention(query.tanh(), key, value, scale=0.3, dropout=0.4, training=True).square().sum()

    torch.manual_seed(8)
    expected = torch.autograd.grad(block(*inputs), inputs)
    torch.manual_seed(8)
    found = torch.autograd.grad(checkpoint(block, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(compiler):
    """From [b, n, h d] as a linear layer gives it, and back: strides that a compiler relies on."""
    x, key, value = torch.randn(3, 17, 32, requires_grad=True), *make(3, 4, 2, 17, 13, 8)[1:]
    mask = torch.randn(3, 1, 1, 13)

    def step(x, key, value):
        query = x.view(3, 17, 4, 8).transpose(1, 2) * 1.5
        out = attention(query, key, value, mask, scale=0.3, dropout=0.2, training=True)
        return out.flatten(2).square().sum()

    with torch._inductor.config.patch(
        force_disable_caches=True
    ):  # a cache knows nothing of our own code's changes
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        results = []
        for function in (step, compiled):
            torch.manual_seed(9)
            loss = function(x, key, value)
            results.append((loss, *torch.autograd.grad(loss, (x, key, value))))
        torch.manual_seed(9)
        again = compiled(x, key, value)
        assert torch.equal(again, results[1][0])
        assert not torch.equal(compiled(x, key, value), again)
    if compiler == "aot_eager":  # inductor has a generator of its own: the masks are others
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    op = torch.ops.fasttune.attention
    if REFUSED[dtype]:
        pytest.skip(REFUSED[dtype])
    query, key, value = make(2, 4, 2, 5, 6, 8, dtype=dtype)
    turned = query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    mask = torch.randn(2, 1, 1, 6).to(dtype)
    torch.library.opcheck(op, (query, key, value, mask, 0.3, 0.2, SEED))
    torch.library.opcheck(op, (turned, key, value, None, 0.3, 0.0, None))
    with torch.no_grad():
        out, stats = op(query, key, value, mask, 0.3, 0.2, SEED)
    arguments = [tensor.detach() for tensor in (torch.randn_like(out), turned, key, value)]
    torch.library.opcheck(torch.ops.fasttune.attention_backward, (*arguments, mask, stats, 0.3, 0.2, SEED))


def test_autocast_computes_in_its_dtype_but_leaves_the_mask():
    inputs = make(2, 4, 2, 17, 13, 8)
    mask = torch.zeros(2, 1, 17, 13)
    mask[0, :, 4] = torch.finfo(torch.float32).min  # -inf in bfloat16, and the row would be NaN
    results = []
    for cast in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = attention(*inputs, mask, scale=0.3, dropout=0.2, training=True)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    assert results[1][0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in results[1][1:])
    for one, other in zip(*results, strict=True):
        # A handful of roundings by 2^-9 each, of scores up to about 3.
        assert (one - other.float()).norm() <= 2**-6 * one.norm()


def test_backend_tells_the_truth():
    served = library._C.attention_types() if library._C is not None else []
    for dtype in DTYPES:
        expected = "cpu" if str(dtype).removeprefix("torch.") in served else "reference"
        assert backend("attention", torch.ones(1, 1, 1, 1, dtype=dtype)).name == expected
    assert backend("attention", torch.ones(1, 1, 1, 1).double()).name == "reference"


def arguments(**changed):
    query, key, value = make(2, 4, 2, 17, 13, 8)
    return {"query": query, "key": key, "value": value, "scale": 0.3, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"query": torch.ones(4, 17, 8)},
            r"^query: expected floating-point \[b, h, q, d\], found .* \[4, 17, 8\]",
        ),
        ({"query": torch.ones(2, 4, 17, 8).int()}, r"^query: expected floating-point .* found torch.int32"),
        (
            {"key": torch.ones(2, 3, 13, 8)},
            r"^key: expected \[2, a divisor of 4, 1 or more, 8\], found \[2, 3, 13, 8\]",
        ),
        ({"key": torch.ones(1, 2, 13, 8)}, r"^key: expected .*, found \[1, 2, 13, 8\]"),
        ({"key": torch.ones(2, 2, 13, 9)}, r"^key: expected .*, found \[2, 2, 13, 9\]"),
        ({"key": torch.ones(2, 0, 13, 8)}, r"^key: expected .*, found \[2, 0, 13, 8\]"),
        ({"key": torch.ones(2, 2, 0, 8)}, r"^key: expected .*, found \[2, 2, 0, 8\]"),
        ({"key": torch.ones(2, 13, 8)}, r"^key: expected .*, found \[2, 13, 8\]"),
        (
            {"key": torch.ones(2, 2, 13, 8).half()},
            r"^key: expected query's dtype torch.float32, found torch.float16",
        ),
        (
            {"value": torch.ones(2, 2, 13, 9)},
            r"^value: expected key's shape \[2, 2, 13, 8\], found \[2, 2, 13, 9\]",
        ),
        ({"value": torch.ones(2, 2, 13, 8).double()}, r"^value: expected query's dtype torch.float32, found"),
        ({"mask": torch.ones(17, 12)}, r"^mask: expected torch.float32 .* \[2, 4, 17, 13\], found .* \[17, 12\]"),
        ({"mask": torch.ones(1, 2, 1, 17, 13)}, r"^mask: expected .* found .* \[1, 2, 1, 17, 13\]"),
        ({"mask": torch.ones(17, 13).bool()}, r"^mask: expected torch.float32 .* found torch.bool"),
        ({"mask": torch.ones(17, 13).bfloat16()}, r"^mask: expected torch.float32 .* found torch.bfloat16"),
        ({"mask": torch.ones(17, 13).requires_grad_()}, r"^mask: expected a tensor without gradient"),
        ({"dropout": -0.1}, r"^dropout: expected a probability in \[0, 1\], found -0.1"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        attention(**arguments(**changed))


@needs_kernel
def test_kernel_checks_what_it_is_given():
    query, key, value = (tensor.detach() for tensor in make(2, 4, 2, 17, 13, 8))
    with pytest.raises(ValueError, match="do not fit"):
        op(query, key[:, :, :, :4], value, None, 0.3, 0.0, None)
    with pytest.raises(TypeError, match="expected a mask of Float or float32, found Half"):
        op(query, key, value, torch.ones(17, 13).half(), 0.3, 0.0, None)
    with pytest.raises(ValueError, match="p must be in"):
        op(query, key, value, None, 0.3, 1.5, SEED)
    out, stats = op(query, key, value, None, 0.3, 0.0, None)
    backward = torch.ops.fasttune.attention_backward
    for dout, rows in ((out[:1], stats), (out.double(), stats), (out, stats[:1]), (out, stats.double())):
        with pytest.raises(ValueError, match="does not fit query"):
            backward(dout, query, key, value, None, rows, 0.3, 0.0, None)
