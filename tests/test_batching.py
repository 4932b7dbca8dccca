"""Buckets, collation, positions."""

import itertools
import math

import numpy as np
import pytest
import torch

from fasttune.batching import (
    Batches,
    Loader,
    Position,
    collate,
    cut,
    padded,
    plan_epoch,
    plan_in_order_of_cost,
    tighten,
)
from fasttune.data import Encoded
from fasttune.media import Limits
from fasttune.readers import MixedRows, Table
from fasttune.rows import open_rows
from fasttune.task import Bundle, Column, Sample, Task


class Samples(list):
    """Encoded samples without rows behind them."""

    keep = True
    sides = None

    def sample(self, index, draw=None):
        return self[index]

    @property
    def costs(self):
        return [sample.cost for sample in self]


def make(lengths):
    return Samples(Sample({"ids": np.arange(1, n + 1, dtype=np.int32), "labels": np.int64(n)}, n) for n in lengths)


LENGTHS = np.random.default_rng(5).lognormal(4, 0.7, 1013).astype(int).clip(3, 512).tolist()


def test_every_sample_stands_in_one_batch_of_each_epoch():
    for epoch in range(2):
        plan = plan_epoch(LENGTHS, 32, 17, epoch)
        assert sorted(index for batch in plan for index in batch) == list(range(1013))
        assert all(len(batch) <= 32 for batch in plan)


def test_the_plan_follows_from_seed_and_epoch():
    assert plan_epoch(LENGTHS, 32, 17, 3) == plan_epoch(LENGTHS, 32, 17, 3)
    assert plan_epoch(LENGTHS, 32, 17, 3) != plan_epoch(LENGTHS, 32, 17, 4)
    assert plan_epoch(LENGTHS, 32, 17, 3) != plan_epoch(LENGTHS, 32, 18, 3)


def test_buckets_keep_padding_under_ten_percent():
    batches = Batches(Loader(make(LENGTHS), {}), 32, 1, 17)
    micro = [m for step, _ in take(batches, Position(), batches.per_epoch) for m in step]
    assert sorted(index for m in micro for index in m.samples) == list(range(1013))
    assert 1 - sum(LENGTHS) / sum(m.padded_cost for m in micro) < 0.10
    assert len(micro) < 1.3 * batches.per_epoch


def test_evaluation_starts_with_the_costliest():
    plan = plan_in_order_of_cost([3, 9, 5, 9], 2)
    assert plan == [[1, 3], [2, 0]]


def test_collate_pads_every_dimension_at_its_end():
    one = Sample({"image": np.ones((3, 2, 4), np.float32), "ids": np.array([7], np.int32)}, 1)
    two = Sample({"image": np.ones((3, 5, 1), np.float32), "ids": np.array([1, 2, 3], np.int32)}, 3)
    batch = collate([one, two], {"ids": -100})
    assert batch["image"].shape == (2, 3, 5, 4)
    assert batch["image"].dtype == torch.float32
    assert float(batch["image"][0, :, 2:].sum()) == 0.0
    assert float(batch["image"][1, :, :, 1:].sum()) == 0.0
    assert batch["ids"].tolist() == [[7, -100, -100], [1, 2, 3]]
    assert batch["ids"].dtype == torch.int64


def test_collate_stacks_scalars():
    batch = collate([Sample({"label": np.int64(2)}, 1), Sample({"label": np.int64(5)}, 1)], {})
    assert batch["label"].tolist() == [2, 5]


@pytest.mark.parametrize(("size", "pieces"), [(32, 4), (33, 4), (3, 4), (1, 2)])
def test_a_batch_is_cut_into_nearly_equal_pieces(size, pieces):
    batch = list(range(size))
    found = cut(batch, pieces)
    assert [index for piece in found for index in piece] == batch
    assert len(found) == min(size, pieces)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_only_uneven_batches_are_cut_further():
    assert tighten([0, 1, 2, 3, 4, 5, 6, 7], [10] * 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert tighten([0, 1, 2, 3, 4, 5, 6, 7], [100, 98, 97, 96, 11, 11, 10, 10]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert tighten([0, 1, 2], [100, 1, 1]) == [[0, 1, 2]]


def test_images_of_like_shapes_stand_together():
    """Portrait and landscape cost the same, and would pad each other."""
    chance = np.random.default_rng(3)
    sides = [(int(h), 512) if i % 2 else (512, int(h)) for i, h in enumerate(chance.integers(318, 512, 400))]
    samples = Samples(Sample({"pixels": np.zeros(side, bool)}, math.prod(side), sides=side) for side in sides)
    samples.sides = sides

    def padding(plan):
        costs = [(sum(samples.costs[i] for i in batch), padded(batch, samples.costs, sides)) for batch in plan]
        return 1 - sum(cost for cost, _ in costs) / sum(whole for _, whole in costs)

    assert padding(plan_epoch(samples.costs, 8, 17, 0)) > 0.15
    assert padding(plan_epoch(samples.costs, 8, 17, 0, sides)) < 0.10
    micro = Loader(samples, {}).load([0, 1])
    assert micro.padded_cost == micro.tensors["pixels"].numel() == 2 * 512 * 512
    batch = [0, 2, 4, 6, 1, 3, 5, 7]
    assert tighten(batch, samples.costs, sides) == [batch[:4], batch[4:]]


def take(batches, position, count):
    source = batches.starting(position)
    return [next(source) for _ in range(count)]


def test_batches_go_on_at_any_position():
    """Resuming at the position that a step gave yields the batch that would have followed."""
    batches = Batches(Loader(make(LENGTHS[:70]), {}), 16, 2, 17)
    assert batches.per_epoch == 5
    whole = take(batches, Position(), 12)
    for done in range(1, 12):
        position = whole[done - 1][1]
        micro, following = take(batches, position, 1)[0]
        assert [m.samples for m in micro] == [m.samples for m in whole[done][0]]
        assert following == whole[done][1]
    assert whole[4][1] == Position(1, 0)


def test_costs_of_a_micro_batch_tell_its_padding():
    micro = Loader(make([3, 5, 9]), {}).load([0, 2])
    assert (micro.cost, micro.padded_cost) == (12, 18)
    assert micro.tensors["ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0, 0], list(range(1, 10))]


class Rolled(Task):
    """A number and, in training, a draw of its row."""

    columns = (Column("number", "number"),)

    def vary(self, row, random):
        return {**row, "draw": random.integers(0, 2**31)}

    def encode(self, row, bundle, train):
        return Sample({"number": np.float32(row["number"]), "draw": np.int64(row.get("draw", -1))}, cost=1)


def rolled(train=True):
    rows = open_rows(Table("rows", MixedRows({"number": i} for i in range(10))), Rolled.columns, {}, Limits())
    return Encoded(rows, Rolled(), Bundle(torch.nn.Linear(1, 1), None, (), (), ()), train=train).fill()


def draws(batches, position, count):
    """The draw of each row, by (step, row)."""
    found = {}
    for step, (micro_batches, _) in enumerate(itertools.islice(batches.starting(position), count)):
        for micro in micro_batches:
            numbers, drawn = micro.tensors["number"].tolist(), micro.tensors["draw"].tolist()
            found |= {(step, number): draw for number, draw in zip(numbers, drawn, strict=True)}
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_vary_by_seed_epoch_and_row_alone(workers):
    """Whatever the accumulation, the workers, and the step that a resumed run starts at."""
    encoded = rolled()
    first = draws(Batches(Loader(encoded, {}, workers), 4, 1, 17), Position(), 6)
    assert len(first) == len(set(first.values())) == 20
    assert draws(Batches(Loader(encoded, {}, workers), 4, 2, 17), Position(), 6) == first
    resumed = draws(Batches(Loader(encoded, {}, workers), 4, 1, 17), Position(1, 1), 2)
    assert resumed == {(step - 4, row): draw for (step, row), draw in first.items() if step >= 4}
    assert not set(draws(Batches(Loader(encoded, {}, workers), 4, 1, 18), Position(), 6).values()) & {
        *first.values()
    }


def test_rows_that_are_looked_at_do_not_vary():
    encoded, valid = rolled(), rolled(train=False)
    assert encoded[3].tensors["draw"] == valid[3].tensors["draw"] == -1
    assert valid.sample(3, (17, 0)).tensors["draw"] == -1
    assert next(iter(Loader(valid, {}).along([[0, 1]]))).tensors["draw"].tolist() == [-1, -1]
