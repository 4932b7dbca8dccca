"""Dropout: the random numbers against published answers, the kernel against the reference, bit by bit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttune.ops import dropout, library
from fasttune.ops.dropout import (
    DTYPES,
    draw_seed,
    dropout_add_reference_,
    dropout_reference,
    mask_reference,
    philox_reference,
)

needs_kernel = pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
dropout_seeded = torch.ops.fasttune.dropout_seeded
SIZES = [(1,), (3,), (252,), (507, 123), (4096,), (4097,), (0,), (5, 0), (2, 3, 5, 7)]
SEED = torch.tensor(-1234567890123456789)

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_reference_gives_the_published_numbers(counter, key, answer):
    low, high = words(key)
    assert philox_reference(torch.tensor([words(counter)]), high << 32 | low).tolist() == [words(answer)]


@needs_kernel
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_header_gives_the_published_numbers(counter, key, answer):
    assert library._C.philox4x32_10(words(counter), words(key)) == words(answer)


def drawn(seed: int, n: int, first: int = 0) -> np.ndarray:
    """The 16 bits of elements first .. first + n - 1, in numpy: unsigned numbers, and the words' bytes reread."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    draw = np.arange(first // 8, (first + n + 7) // 8, dtype=np.uint64)
    c = [draw & low, draw >> half, 0 * draw, 0 * draw]
    for turn in range(10):
        key = [(seed + turn * 0x9E3779B9) & 0xFFFFFFFF, ((seed >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF]
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            right >> half ^ c[1] ^ np.uint64(key[0]),
            right & low,
            left >> half ^ c[3] ^ np.uint64(key[1]),
            left & low,
        ]
    return np.stack(c, axis=-1).astype("<u4").view("<u2").ravel()[first % 8 :][:n]


def kept_by_each(p: float, seed: Tensor, n: int) -> list[Tensor]:
    """The mask by the reference and, where there is one, by the kernel."""
    masks = [mask_reference(torch.Size([n]), p, seed)]
    return masks if library._C is None else [*masks, dropout_seeded(torch.ones(n), p, seed) != 0]


@pytest.mark.parametrize("element", range(8))
def test_sixteen_bits_are_taken_from_the_published_numbers_in_order(element):
    word = words(KNOWN[0][2])[element // 2]
    u = word & 0xFFFF if element % 2 == 0 else word >> 16
    for threshold, kept in ((u, True), (u + 1, False)):
        for mask in kept_by_each(threshold / 2**16, torch.tensor(0), 8):
            assert bool(mask[element]) == kept


@pytest.mark.parametrize(
    ("p", "threshold"),
    [
        (0.3, 19661),  # 19660.8
        (2**-17, 0),  # 0.5
        (3 * 2**-17, 2),  # 1.5
        (1 - 3 * 2**-17, 65534),  # 65534.5
        (1 - 1.01 * 2**-17, 65535),
        (1 - 2**-17, 65536),  # 65535.5
    ],
)
def test_mask_is_the_documented_function_of_seed_and_index(p, threshold):
    n = 2**20 + 5
    expected = torch.from_numpy(drawn(int(SEED), n) >= threshold)
    assert expected.all() == (threshold == 0)
    assert expected.any() == (threshold < 65536)
    for mask in kept_by_each(p, SEED, n):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("p", [2**-17, 3 * 2**-17, 0.3, 1 - 1.01 * 2**-17])
def test_scale_is_that_of_p_itself(p):
    n = 2**20
    y = dropout_seeded(torch.ones(n, dtype=torch.float64), p, SEED)
    assert set(y.unique().tolist()) <= {0.0, 1 / (1 - p)}
    assert (y != 0).any()


@needs_kernel
@pytest.mark.parametrize("first", [0, 8, 13, 2**32 - 500, 2**35 - 500, 2**35 - 3, 2**35, 2**60 + 7])
def test_kernel_draws_from_any_element_on(first):
    for n in (1, 3, 999):
        expected = drawn(int(SEED), n, first) >= 19661
        assert library._C.draw_mask(int(SEED), first, n, 0.3) == expected.tolist()
        assert not any(library._C.draw_mask(int(SEED), first, n, 1.0))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0, 1e-12, 1 - 1e-12])
def test_kernel_is_the_reference_bitwise(shape, dtype, p):
    x = torch.randn(shape).to(dtype)
    assert torch.equal(dropout_seeded(x, p, SEED), dropout_reference(x, p, SEED))
    ours = torch.randn(shape).to(dtype)
    theirs = ours.clone()
    torch.ops.fasttune.dropout_add_(ours, x, p, SEED)
    dropout_add_reference_(theirs, x, p, SEED)
    assert torch.equal(ours, theirs)


@needs_kernel
def test_kernel_rounds_special_values_as_the_reference_does():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = every.view(dtype)
        ours, theirs = dropout_seeded(x, 0.3, SEED), dropout_reference(x, 0.3, SEED)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num().view(torch.int16), theirs.nan_to_num().view(torch.int16))


DIGEST = """
import hashlib, torch
import fasttune.ops
x = torch.arange(62361, dtype=torch.float64).sin()
out = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    y = torch.ops.fasttune.dropout_seeded(x.to(dtype), 0.1, torch.tensor(77))
    torch.ops.fasttune.dropout_add_(y, x.to(dtype), 0.4, torch.tensor(78))
    out.update(y.view(torch.uint8).numpy().tobytes())
out.update(bytes(fasttune.ops.library._C.draw_mask(77, 2**35 - 501, 1000, 0.4)))
print(fasttune.ops.build_info()["cpu"], out.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_gives_the_same_bits():
    x = torch.arange(62361, dtype=torch.float64).sin()
    expected = hashlib.sha256()
    for dtype in DTYPES:
        y = dropout_reference(x.to(dtype), 0.1, torch.tensor(77))
        dropout_add_reference_(y, x.to(dtype), 0.4, torch.tensor(78))
        expected.update(y.view(torch.uint8).numpy().tobytes())
    expected.update((drawn(77, 1000, 2**35 - 501) >= 26214).tobytes())
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "ATEN_CPU_CAPABILITY": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("default", "avx2")
    ]
    found = [run.communicate()[0].split() for run in runs]
    assert [digest for _, digest in found] == [expected.hexdigest()] * 2
    assert found[0][0] == "default"


def test_threads_do_not_change_the_mask():
    x = torch.randn(507, 1230)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(dropout_seeded(x, 0.2, SEED))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_the_mask(dtype):
    base = torch.randn(40, 60).to(dtype)
    for x in (base.t(), base[::2, 1::3], base[:, :1].expand(40, 33), base.flatten()[1:]):
        ours = dropout_seeded(x, 0.4, SEED)
        assert ours.is_contiguous()
        assert torch.equal(ours, dropout_reference(x.contiguous(), 0.4, SEED))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_is_within_four_sigma(p):
    n = 507 * 1230
    kept = dropout_seeded(torch.ones(n), p, torch.tensor(5)).count_nonzero().item()
    assert abs(kept - n * (1 - p)) < 4 * (n * p * (1 - p)) ** 0.5


def test_masks_of_seeds_rows_and_neighbours_are_independent():
    p, shape = 0.3, (256, 1024)
    one, two = (dropout_seeded(torch.ones(shape), p, torch.tensor(seed)) > 0 for seed in (1, 2))
    far = dropout_seeded(torch.ones(shape), p, torch.tensor(1 + 2**32)) > 0
    pairs = [(one, two), (one, far), (one[:-1], one[1:])]
    pairs += [(one[:, :-by], one[:, by:]) for by in (1, 2, 4, 8)]
    for left, right in pairs:
        n, both = left.numel(), (1 - p) ** 2
        agree = (left & right).sum().item()
        # Pairs of one mask overlap: the variance of their count is at most three times the binomial one.
        assert abs(agree - n * both) < 4 * (3 * n * both * (1 - both)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_draws_the_mask_of_the_forward(dtype):
    x = torch.rand(507, 123).add(1).to(dtype).requires_grad_()
    y = dropout(x, 0.25, training=True)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    kept = y != 0
    assert 0.7 < kept.float().mean() < 0.8
    scaled = (upstream.to(torch.promote_types(dtype, torch.float32)) * (1 / 0.75)).to(dtype)
    assert torch.equal(x.grad, torch.where(kept, scaled, 0))


def test_backward_takes_any_upstream_stride():
    x = torch.randn(33, 21, requires_grad=True)
    (plain,) = torch.autograd.grad(dropout_seeded(x, 0.3, SEED), x, torch.ones(33, 21))
    (expanded,) = torch.autograd.grad(dropout_seeded(x, 0.3, SEED).sum(), x)
    (turned,) = torch.autograd.grad(dropout_seeded(x, 0.3, SEED).t(), x, torch.ones(21, 33))
    assert torch.equal(plain, expanded)
    assert torch.equal(plain, turned)


def test_gradcheck_first_and_second_order():
    x = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout_seeded(x, 0.3, SEED), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout_seeded(x, 0.3, SEED), x)


def test_nothing_but_the_seed_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(torch.randn(100, 100, requires_grad=True), 0.1, training=True)
    assert [tensor.numel() for tensor in saved] == [1]


def test_nothing_to_drop_returns_x_itself():
    x = torch.randn(5)
    assert dropout(x, 0.0, training=True) is x
    assert dropout(x, 0.9, training=False) is x


def test_all_dropped_gives_zeros_and_zero_gradients():
    x = torch.randn(252, requires_grad=True)
    y = dropout(x, 1.0, training=True)
    y.backward(torch.randn(252))
    assert not y.any()
    assert not x.grad.any()


def test_dropped_infinities_and_nans_are_zero():
    x = torch.tensor([float("nan"), float("inf")]).repeat(500)
    y = dropout_seeded(x, 0.5, SEED)
    kept = mask_reference(x.shape, 0.5, SEED)
    assert torch.equal(y == 0, ~kept)
    assert y[::2][kept[::2]].isnan().all()
    assert y[1::2][kept[1::2]].isinf().all()


def test_manual_seed_repeats_and_each_call_differs():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert torch.equal(dropout(x, 0.5, training=True), second)
    assert not torch.equal(first, second)


def test_seeds_use_all_64_bits():
    every = torch.stack([draw_seed() for _ in range(200)])
    for bit in range(64):
        assert 0 < ((every >> bit) & 1).sum() < 200


def test_checkpointing_recomputes_the_mask():
    x = torch.randn(60, 60, requires_grad=True)

    def block(x):
        return (dropout(x.tanh(), 0.4, training=True) * x).sum()

    torch.manual_seed(8)
    (plain,) = torch.autograd.grad(block(x), x)
    torch.manual_seed(8)
    (recomputed,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False), x)
    assert torch.equal(plain, recomputed)


def test_opcheck():
    torch.library.opcheck(dropout_seeded, (torch.randn(6, 5, requires_grad=True), 0.3, SEED))
    torch.library.opcheck(dropout_seeded, (torch.randn(5, 6, dtype=torch.bfloat16).t(), 0.3, SEED))
    torch.library.opcheck(torch.ops.fasttune.dropout_add_, (torch.randn(6, 5), torch.randn(6, 5), 0.3, SEED))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_out_of_range_is_named(p):
    with pytest.raises(ValueError, match=r"^p: expected a probability in \[0, 1\]"):
        dropout(torch.ones(3), p, training=True)


def test_other_dtypes_are_named():
    with pytest.raises(TypeError, match=r"^x: .* found torch\.int64"):
        dropout(torch.ones(3, dtype=torch.int64), 0.5, training=True)


@needs_kernel
def test_kernel_checks_what_it_is_given():
    x = torch.ones(4)
    with pytest.raises(ValueError, match="p must be in"):
        dropout_seeded(x, 2.0, SEED)
    with pytest.raises(ValueError, match="seed must be one int64"):
        dropout_seeded(x, 0.5, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="acc must be contiguous and match x"):
        torch.ops.fasttune.dropout_add_(torch.ones(5), x, 0.5, SEED)
