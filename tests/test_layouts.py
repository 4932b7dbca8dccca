"""A run on data of a layout that its task opens by itself: splits, shares, bad rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fasttune import config as configs
from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune.prepare import open_tables
from fasttune.progress import Progress
from fasttune.signals import Signals
from fasttune.task import Column, Task


class Shelf(Task):
    """A folder with a file of words a split: the toy of a layout that a task opens by itself."""

    columns = (Column("text", "text"), Column("label", "label"))

    @classmethod
    def open(cls, place: Place) -> Opened | None:
        splits = sorted(file.stem for file in place.path.glob("*.words"))
        if not splits:
            return None
        split = place.choose(splits)
        words = (place.path / f"{split}.words").read_text().split()
        rows = [{"text": word, "label": DataError(None, "no class") if word == "?" else word[0]} for word in words]
        return Opened(rows, None, split, tuple(splits), ("a class a first letter",))

    def meter(self) -> Any:
        raise NotImplementedError


@pytest.fixture
def shelf(tmp_path: Path) -> Any:
    """shelf({"train": "words of it"}, **data) -> the tables of a run on it."""

    def tables(words: dict[str, str], path: str = "", **data: Any) -> Any:
        for split, text in words.items():
            (tmp_path / f"{split}.words").write_text(text)
        config = configs.build({"task": "shelf", "model": "none", "data": {"train": f"{tmp_path}{path}", **data}})
        return open_tables(config, Shelf(), Progress(quiet=True), Signals())

    return tables


def texts_of(rows: Any) -> list[str]:
    return [rows.read(i)["text"] for i in range(len(rows))]


TWO = {"train": "apple ant bee bear", "val": "ape bat", "test": "axe box"}


def test_the_validation_split_beside_train_is_the_default(shelf: Any, tmp_path: Path) -> None:
    tables = shelf(TWO)
    assert (texts_of(tables.train), texts_of(tables.valid)) == (["apple", "ant", "bee", "bear"], ["ape", "bat"])
    assert tables.valid_from == f"{tmp_path}:val"
    assert f"{tmp_path}:val: a class a first letter" in tables.notes
    again = shelf({}, valid=tables.valid_from)
    assert (texts_of(again.valid), again.fingerprint) == (["ape", "bat"], tables.fingerprint)


def test_splits_and_shares_that_are_named_win(shelf: Any, tmp_path: Path) -> None:
    assert texts_of(shelf(TWO, valid=f"{tmp_path}:test").valid) == ["axe", "box"]
    assert texts_of(shelf({}, valid=str(tmp_path)).valid) == ["ape", "bat"]
    assert len(shelf({}, valid=0.5).valid) == 2
    other = shelf({"all": "apple ant bee bear ape bat cat cow crab dog"}, path=":all")
    assert other.valid_from == configs.SHARE_HELD_OUT
    assert len(other.valid) == 1


def test_rows_that_a_layout_marks_as_bad(shelf: Any) -> None:
    tables = shelf({"train": "apple ? bee", "val": "ape ?"})
    assert [(bad.file.rpartition(":")[2], bad.row, bad.column, bad.why) for bad in tables.bad] == [
        ("train", 2, "label", "no class"),
        ("val", 2, "label", "no class"),
    ]
    assert texts_of(tables.train) == ["apple", "bee"]
