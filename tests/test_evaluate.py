"""Samples joined to rows, caps on rows, parts of a loss: with a task whose rows make several samples."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttune.adapt import Full, Head, Lora, adapt
from fasttune.batching import Batches, Loader, Position
from fasttune.config import build
from fasttune.data import Encoded
from fasttune.errors import DataError
from fasttune.evaluate import evaluate, predict, samples_of, spread
from fasttune.media import Limits
from fasttune.prepare import open_tables, truncated_shares
from fasttune.progress import Progress
from fasttune.readers import MixedRows, Table
from fasttune.rows import open_rows
from fasttune.signals import Signals
from fasttune.task import Bundle, Column, Loss, Metric, Sample, Task


class Words(Task):
    """A sample a word; its prediction is the word's length, a row's the sum. Words over six letters are cut."""

    columns = (Column("text", "text"), Column("name", "text", required=False, target=True))
    metrics = (Metric("total", "max", primary=True),)
    packs = True

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> list[Sample]:
        return [
            Sample(
                {"letters": np.ones(min(len(word), 6), dtype=np.int64)},
                cost=min(len(word), 6),
                truncated={"text": max(0, len(word) - 6), "name": 0},
            )
            for word in row["text"].split()
        ]

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> Loss:
        lengths = batch["letters"].sum()
        return Loss(2.0 * lengths, lengths, {"half": 0.5 * lengths})

    def decode(self, model: Any, batch: dict[str, torch.Tensor], bundle: Bundle) -> list[int]:
        return [int(n) for n in batch["letters"].sum(1)]

    def join(self, predictions: list[int], row: Any) -> dict[str, Any]:
        return {"words": predictions, "text": row["text"]}

    def pack(self, samples: list[Sample]) -> list[Sample]:
        letters = np.concatenate([sample.tensors["letters"] for sample in samples])
        return [Sample({"letters": letters}, cost=len(letters))]

    def meter(self) -> Any:
        return Seen()

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return {**metrics, "twice_the_loss": 2 * metrics["loss"]}


class Silent(Words):
    def score(self, model: Any, batch: dict[str, torch.Tensor], bundle: Bundle) -> tuple[Loss, None]:
        return self.loss(model, batch), None


class Seen:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def update(self, prediction: Any, reference: Any) -> None:
        assert prediction["text"] == reference["text"]
        self.rows.append(prediction["words"])

    def merge(self, other: Any) -> None:
        self.rows += other.rows

    def result(self) -> dict[str, Any]:
        return {"total": sum(map(sum, self.rows)), "rows": sorted(self.rows)}


TEXTS = ("one", "three little words", "a considerably longer row of words", "two words", "here", "and there too")


def encoded(task: Task, train: bool = False) -> Encoded:
    bundle = Bundle(torch.nn.Linear(2, 2), None, (), (), ())
    rows = open_rows(Table("rows", MixedRows([{"text": text} for text in TEXTS])), task.columns, {}, Limits())
    return Encoded(rows, task, bundle, train).fill()


def lengths(text: str) -> list[int]:
    return [min(len(word), 6) for word in text.split()]


def run(task: Task, **settings: Any) -> dict[str, Any]:
    samples = encoded(task)
    return evaluate(task, samples.bundle, Loader(samples, {}), 2, **settings)


def test_predictions_of_samples_are_joined_in_the_order_of_the_row() -> None:
    metrics = run(Words())
    assert metrics["rows"] == sorted(lengths(text) for text in TEXTS)
    samples = encoded(Words())
    found = predict(Words(), samples.bundle, Loader(samples, {}), 3)
    assert found == [(i, {"words": lengths(text), "text": text}) for i, text in enumerate(TEXTS)]


def test_a_task_that_makes_several_samples_must_join_them() -> None:
    class Careless(Words):
        join = Task.join

    with pytest.raises(ValueError, match="too many values to unpack"):
        run(Careless())


def test_loss_and_parts_are_means_and_finish_sees_them() -> None:
    metrics = run(Words())
    assert (metrics["loss"], metrics["half"], metrics["twice_the_loss"]) == (2.0, 0.5, 4.0)


def test_without_predictions_the_meter_sees_nothing() -> None:
    metrics = run(Silent())
    assert metrics["rows"] == []
    assert metrics["loss"] == 2.0


@pytest.mark.parametrize("most", [1, 2, 4, 6, 50])
def test_at_most_so_many_rows_spread_evenly_and_whole(most: int) -> None:
    samples = encoded(Words())
    chosen = spread(samples, most)
    assert len(chosen) == min(most, len(TEXTS))
    assert chosen[0] == 0
    assert max(np.diff(chosen), default=0) <= -(-len(TEXTS) // most) + 1
    assert run(Words(), max_rows=most)["rows"] == sorted(lengths(TEXTS[i]) for i in chosen)
    assert {samples.owner[i] for i in samples_of(samples, chosen)} == set(chosen)


def test_truncation_is_counted_by_role() -> None:
    samples = encoded(Words())
    words = [word for text in TEXTS for word in text.split()]
    cut = sum(len(word) > 6 for word in words)
    assert samples.truncated == Counter({"text": cut})
    assert truncated_shares(samples) == {"text": cut / len(words)}


def test_packing_is_for_training_batches_and_leaves_nothing_to_tighten() -> None:
    task = Words()
    samples = encoded(task, train=True)
    batches = Batches(Loader(samples, {}, pack=task.pack), 16, 1, 17)
    micro, following = next(batches.starting(Position()))
    assert len(micro) == 1
    assert micro[0].tensors["letters"].shape == (1, sum(samples.costs))
    assert micro[0].padded_cost == micro[0].cost == sum(samples.costs)
    assert following == Position(1, 0)


def test_columns_are_checked_together_before_any_row(tmp_path: Path) -> None:
    class Needs(Words):
        def check_columns(self, roles: frozenset[str]) -> None:
            if "name" not in roles:
                raise DataError(None, f"needs a name beside {', '.join(sorted(roles))}")

    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "one", "name": "1"}\n{"text": "two", "name": "2"}\n')
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"text": ""}\n')
    for data in ({"train": bare}, {"train": tmp_path / "train.jsonl", "valid": bare}):
        config = build({"task": "x", "model": "x", "data": {split: str(path) for split, path in data.items()}})
        with Signals() as signals, pytest.raises(DataError, match="needs a name beside text"):
            open_tables(config, Needs(), Progress(quiet=True), signals)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.out = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("strategy", "new", "trained"),
    [
        (Lora(rank=2), True, {"out.weight", "out.bias", "base.lora_a", "base.lora_b"}),
        (Lora(rank=2), False, {"base.lora_a", "base.lora_b"}),
        (Head(), False, {"out.weight", "out.bias"}),
        (Full(), False, {"out.weight", "out.bias", "base.weight", "base.bias"}),
    ],
)
def test_a_pretrained_head_is_frozen_beside_lora(strategy: Any, new: bool, trained: set[str]) -> None:
    bundle = Bundle(Tiny(), None, ("out",), (), ("base",), head_is_new=new)
    assert set(adapt(bundle, strategy).trained) == trained
