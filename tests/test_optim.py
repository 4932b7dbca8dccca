"""Schedules, groups, exact accumulation, masters."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fasttune.adapt import adapt
from fasttune.config import SGD, AdamW, Full, Schedule, Train
from fasttune.optim import Optimizer, lr_factor
from fasttune.task import Bundle


def mlp(width=6):
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2)
    )
    return Bundle(model, None, ("3",), ("1", "2"), ("1", "2"))


def settings(**changes):
    return Train(**{"lr": 0.1, "head_lr": 0.4, "precision": "fp32", **changes})


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules_warm_up_peak_and_end(kind):
    schedule = Schedule(kind=kind, warmup=0.1, final=0.2)
    factors = [lr_factor(schedule, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert lr_factor(schedule, 100, 100) == pytest.approx(1.0 if kind == "constant" else 0.2)


def test_warmup_from_one_on_is_steps():
    assert lr_factor(Schedule(warmup=4), 3, 1000) == pytest.approx(4 / 5)
    assert lr_factor(Schedule(warmup=0), 0, 10) == 1.0


def test_cosine_is_half_way_in_the_middle():
    assert lr_factor(Schedule(kind="cosine", warmup=0), 50, 100) == pytest.approx(0.5)


def test_layer_decay_goes_down_from_the_head_and_norms_have_no_weight_decay():
    adapted = adapt(mlp(), Full(layer_decay=0.5))
    groups = Optimizer(adapted, settings(), 10).torch.param_groups
    peak = {}
    for group in groups:
        for parameter in group["params"]:
            name = next(n for n, master in adapted.masters.items() if master is parameter)
            peak[name] = group["peak"]
            assert group["weight_decay"] == (0.01 if name.endswith("weight") else 0.0)
    assert peak["3.weight"] == 0.4
    assert peak["2.weight"] == pytest.approx(0.05)
    assert peak["1.weight"] == pytest.approx(0.025)
    assert peak["0.weight"] == pytest.approx(0.0125)


def test_modules_have_rates_of_their_own():
    """The longest name counts; the head's rate is multiplied too."""
    bundle = mlp()
    bundle.rates = {"0": 0.1, "3": 0.5, "30": 9.0}
    optimizer = Optimizer(adapt(bundle, Full()), settings(lr=0.1, head_lr=0.4), 1)
    names = {id(master): name for name, master in optimizer.masters.items()}
    peaks = {names[id(m)]: group["peak"] for group in optimizer.torch.param_groups for m in group["params"]}
    assert peaks["0.weight"] == pytest.approx(0.01)
    assert peaks["1.weight"] == pytest.approx(0.1)
    assert peaks["3.weight"] == pytest.approx(0.2)


def run(pieces, dtype=torch.float32, steps=3):
    """Trains on 32 rows of unequal weight, cut into `pieces`; returns the masters."""
    bundle = mlp()
    adapted = adapt(bundle, Full(), dtype=dtype)
    optimizer = Optimizer(adapted, settings(clip=0.5, accumulation=1), steps)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(32, 4, generator=generator)
    weight = torch.rand(32, generator=generator)
    for step in range(steps):
        for part in torch.arange(32).chunk(pieces):
            loss = (bundle.model(x[part]).float().square().sum(1) * weight[part]).sum()
            loss.backward()
            optimizer.collect()
        optimizer.step(step, float(weight.sum()))
    return adapted.masters


@pytest.mark.parametrize("pieces", [2, 4, 5, 32])
def test_accumulation_is_exact_to_rounding(pieces):
    whole, cut = run(1), run(pieces)
    for name, master in whole.items():
        torch.testing.assert_close(cut[name], master, rtol=1e-5, atol=1e-7)


def test_bf16_training_moves_masters_by_less_than_a_bf16_step():
    """An update below bf16's resolution must not vanish: 300 of them add up in the fp32 masters."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    adapted = adapt(Bundle(model, None, ("0",), (), ()), Full(), dtype=torch.bfloat16)
    steady = Schedule(kind="constant", warmup=0)
    config = settings(lr=1e-4, head_lr=1e-4, optimizer=SGD(momentum=0.0), schedule=steady)
    optimizer = Optimizer(adapted, config.model_copy(update={"clip": 0.0}), 300)
    for step in range(300):
        model(torch.ones(1, 1)).sum().backward()
        optimizer.collect()
        optimizer.step(step, 1.0)
    assert float(adapted.masters["0.weight"]) == pytest.approx(1 - 300e-4, rel=1e-4)
    assert float(model[0].weight.detach()) == pytest.approx(0.97, rel=5e-3)


def test_clipping_bounds_the_norm_and_reports_it_unclipped():
    bundle = mlp()
    adapted = adapt(bundle, Full())
    before = {name: master.clone() for name, master in adapted.masters.items()}
    config = settings(
        lr=1.0, head_lr=1.0, clip=0.25, optimizer=SGD(momentum=0.0), schedule=Schedule(kind="constant", warmup=0)
    )
    optimizer = Optimizer(adapted, config, 1)
    (1000 * bundle.model(torch.ones(3, 4)).square().sum()).backward()
    optimizer.collect()
    done = optimizer.step(0, 3.0)
    moved = math.sqrt(sum(float((adapted.masters[n] - before[n]).square().sum()) for n in before))
    assert done.norm > 1
    assert moved == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    bundle = mlp()
    adapted = adapt(bundle, Full())
    before = {name: master.clone() for name, master in adapted.masters.items()}
    optimizer = Optimizer(adapted, settings(), 2)
    (bundle.model(torch.ones(3, 4)).sum() * poison).backward()
    optimizer.collect()
    assert not optimizer.step(0, 3.0).taken
    assert all(torch.equal(adapted.masters[name], before[name]) for name in before)
    bundle.model(torch.ones(3, 4)).square().sum().backward()
    optimizer.collect()
    assert optimizer.step(1, 3.0).taken


@pytest.mark.parametrize("chosen", [AdamW(), SGD()])
def test_state_put_back_goes_on_bit_for_bit(chosen):
    def train(optimizer, bundle, steps):
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            bundle.model(x).square().sum().backward()
            optimizer.collect()
            optimizer.step(step, 8.0)

    config = settings(optimizer=chosen)
    bundle = mlp()
    adapted = adapt(bundle, Full())
    optimizer = Optimizer(adapted, config, 6)
    train(optimizer, bundle, range(3))
    masters = {name: master.clone() for name, master in adapted.masters.items()}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    train(optimizer, bundle, range(3, 6))

    again = mlp()
    resumed = adapt(again, Full())
    other = Optimizer(resumed, config, 6)
    other.load_state(masters, state)
    train(other, again, range(3, 6))
    for name, master in adapted.masters.items():
        assert torch.equal(resumed.masters[name], master)


def test_gradual_unfreezing_starts_at_the_head_and_ends_with_everything():
    bundle = mlp()
    adapted = adapt(bundle, Full(gradual_unfreezing=0.5))
    optimizer = Optimizer(adapted, settings(), 100)

    def trained(step):
        optimizer.unfreeze(step)
        return {name.split(".")[0] for name, p in bundle.model.named_parameters() if p.requires_grad}

    assert trained(0) == {"3"}
    assert trained(17) == {"3", "2"}
    assert trained(34) == {"3", "2", "1"}
    assert trained(50) == {"3", "2", "1", "0"}
    assert trained(99) == {"3", "2", "1", "0"}
