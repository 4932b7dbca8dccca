"""Data that are no table: where a task is asked for rows (`Task.open`), and what it answers with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune.errors import DataError, nearest

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What the parts of a set of data are called."""


def named_splits(role: str, held: Iterable[str]) -> list[str]:
    """Those of the names that mean train, validation or test, a year at their end aside: "val2017"."""
    return [name for name in held if name.casefold().rstrip("0123456789") in SPLITS[role]]


@dataclass(frozen=True)
class Place:
    """Where rows are to come from, for `Task.open`.

    path: a folder, or a file that is no table. document: what a JSON file holds that is one object, else None.
    split: the part that is wanted: a key of SPLITS, or a name that the user gave (`PATH:NAME`).
    root: the folder that paths of images and audio are relative to, if the user names one.
    """

    path: Path
    split: str = "train"
    document: dict[str, Any] | None = None
    root: Path | None = None

    def choose(self, splits: Sequence[str]) -> str:
        """The one of these splits that is wanted. Raises DataError with all of them if none is, or several are:
        another is never taken."""
        if self.split in splits:
            return self.split
        found = named_splits(self.split, splits) if self.split in SPLITS else []
        if len(found) == 1:
            return found[0]
        listed = ", ".join(f"{self.path}:{name}" for name in splits) or "there is none"
        if found:
            raise DataError(None, f"several splits are for {self.split}. Name one: {listed}")
        raise DataError(None, f"no split {self.split!r}.{nearest(self.split, splits)} Name one: {listed}")


@dataclass(frozen=True)
class Opened:
    """Rows as they stand in a place, by columns of the task's choosing.

    rows: in order. Where a value is a DataError, the row is bad: it is raised, with file and row, when the column
        is read, and only then (rows to predict may lack what supervises).
    root: the folder that paths of images and audio are relative to and must stay in; None: the place's own.
    split, splits: which part this is, and all that the place holds; None and empty where it has no parts.
    notes: what the user should know of how the rows were read.
    """

    rows: list[dict[str, Any]]
    root: Path | None = None
    split: str | None = None
    splits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
