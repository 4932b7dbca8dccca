"""What host and device share, run on the host: the online softmax, a row's loss, the cutting of rows, Philox."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch

from fasttune.ops.dropout import philox_reference

INF, NAN = math.inf, math.nan


def leaf(x: float) -> torch.Tensor:
    """The online softmax of one element: the largest, and the sum of exp(x - largest)."""
    return torch.tensor([x, 1.0 if x == x and x != -INF else x - x if x != x else 0.0])


def combined(emulated, parts: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """All parts, joined two by two in random order."""
    parts = list(parts)
    while len(parts) > 1:
        i, j = torch.randperm(len(parts), generator=generator)[:2].tolist()
        one, other = parts[i], parts[j]
        both = torch.empty(2)
        emulated.softmax_combine(one, other, both)
        turned = torch.empty(2)
        emulated.softmax_combine(other, one, turned)
        assert torch.equal(both.view(torch.int32), turned.view(torch.int32))
        parts = [part for k, part in enumerate(parts) if k not in (i, j)] + [both]
    return parts[0]


@pytest.mark.parametrize("seed", range(5))
def test_any_tree_of_combines_is_logsumexp(emulated, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(97, generator=generator) * 20
    x[::7] = -INF
    parts = [leaf(value) for value in x.tolist()] + [torch.tensor([-INF, 0.0])] * 5
    top, total = combined(emulated, parts, generator).tolist()
    assert top == x.max()
    # 97 additions and twice as many exponentials in float32.
    assert top + math.log(total) == pytest.approx(x.double().logsumexp(0).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "finite"),
    [((-INF, -INF), True), ((-INF, 3.0), True), ((NAN, 3.0), False), ((NAN, -INF), False), ((INF, 1.0), False)],
)
def test_combine_of_special_values(emulated, values, finite):
    generator = torch.Generator().manual_seed(0)
    # As a kernel makes them: exp(inf - inf) and exp(nan - anything) are NaN.
    parts = [torch.tensor([x if x == x else -INF, NAN if x != x or x == INF else leaf(x)[1]]) for x in values]
    top, total = combined(emulated, [*parts, torch.tensor([-INF, 0.0])], generator).tolist()
    if finite:
        assert top == max(values)
        assert total == sum(x > -INF for x in values)
    else:
        assert math.isnan(total)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_row_loss_and_factors_are_the_formulas_derivatives(emulated, weighted, smoothing, z_loss):
    generator = torch.Generator().manual_seed(3)
    z = (4 * torch.randn(11, generator=generator, dtype=torch.float64)).requires_grad_()
    w = torch.rand(11, generator=generator, dtype=torch.float64) if weighted else torch.ones(11).double()
    target = 4
    nll = z.logsumexp(0) - z
    loss = (1 - smoothing) * w[target] * nll[target] + smoothing / 11 * (w * nll).sum()
    loss = loss + z_loss * w[target] * z.logsumexp(0).square()
    (exact,) = torch.autograd.grad(loss, z)

    z = z.detach()
    top = z.max()
    shifted = z - top
    log_sum = shifted.exp().sum().log()
    options, out = torch.tensor([smoothing, 0.0, z_loss]), torch.empty(4)
    numbers = (top, log_sum, shifted[target], (w * shifted).sum(), w[target], w.sum())
    emulated.softmax_row(options, *(ctypes.c_float(number.item()) for number in numbers), 11, out)
    found, a, b, e = out.double()
    gradient = a * torch.softmax(z, 0) - e * w
    gradient[target] -= b
    # A handful of float32 roundings.
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=2e-6)


COLUMNS = [1, 3, 7, 8, 9, 252, 507, 1000, 4097, 32000, 50257, 128256]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("max_cluster", [1, 16])
def test_plan_covers_every_element_once(emulated, columns, size, max_cluster):
    plan = torch.empty(3, dtype=torch.int32)
    emulated.split_plan(columns, size, max_cluster, plan)
    cluster, threads, held = plan.tolist()
    assert threads % 32 == 0
    assert cluster <= max_cluster
    touched = torch.empty(columns, dtype=torch.uint8)
    for from_, to in itertools.product(range(0, 16, size), repeat=2):
        touched.zero_()
        vectors = emulated.split_cover(4096 + from_, 8192 + to, columns, size, cluster, threads, touched)
        assert vectors >= 0
        assert not held or vectors <= 8
        assert torch.equal(touched, torch.ones_like(touched))


@pytest.mark.parametrize(
    ("columns", "size", "max_cluster", "expected"),
    [
        (128256, 2, 16, (8, 256, 1)),
        (32000, 2, 16, (2, 256, 1)),
        (262144, 2, 16, (8, 512, 1)),
        (262144, 4, 16, (16, 512, 1)),
        (7, 2, 16, (1, 32, 1)),
        (32000, 2, 1, (1, 512, 1)),
        (128256, 2, 1, (1, 1024, 0)),  # 256 KB are more than a block's registers hold
        (2**21, 4, 16, (1, 1024, 0)),
    ],
)
def test_plans(emulated, columns, size, max_cluster, expected):
    plan = torch.empty(3, dtype=torch.int32)
    emulated.split_plan(columns, size, max_cluster, plan)
    assert tuple(plan.tolist()) == expected


@pytest.mark.parametrize("seed", [0, 77, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("first", [0, 2**32 - 2, 2**40])
def test_keys_of_a_kernel_give_the_same_words(emulated, seed, first):
    found = torch.empty(5, 4, dtype=torch.int32)
    emulated.philox_words(ctypes.c_uint64(seed), ctypes.c_uint64(first), 5, found)
    draws = torch.arange(first, first + 5)
    counters = torch.stack((draws & 0xFFFFFFFF, draws >> 32, 0 * draws, 0 * draws), -1)
    assert torch.equal(found.long() & 0xFFFFFFFF, philox_reference(counters, seed - 2**64 * (seed >= 2**63)))
