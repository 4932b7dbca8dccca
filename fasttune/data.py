"""Checked rows, splits and samples. All bad rows are found before the first step, and named at once."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fasttune.errors import BadRow, BadRows, DataError, nearest
from fasttune.rows import Rows, media_kind, value_of
from fasttune.task import Bundle, Column, Sample, Task, overrides

Progress = Callable[[int, int], None]  # (rows done, rows in all); may raise Stopped
Count = Callable[[Mapping[str, Any]], Iterable[str]]
ClassesOf = Callable[[Mapping[str, Any]], Iterable[str] | None]


@dataclass
class Checked:
    """What one look at all rows gave, before any model is loaded.

    good: int64, positions of usable rows. keys: a hash of each row's inputs. labels: of each row, what its label
    column holds, or the classes that it names elsewhere. classes: rows a class, or how often one is named.
    counted: rows a name that the task counts by. names: of each row, those names.
    """

    good: np.ndarray
    bad: list[BadRow]
    keys: list[bytes]
    labels: list[Any]
    classes: Counter[str]
    counted: Counter[str]
    names: list[list[str]]
    fingerprint: str


def check(
    rows: Rows,
    known: set[str] | None = None,
    progress: Progress | None = None,
    count: Count | None = None,
    classes_of: ClassesOf | None = None,
    in_part: bool = False,
) -> Checked:
    """Reads every row but its media. known: the classes that labels must be among (those of train). count: what
    else to count a row by, `Task.count`. classes_of: what names a row's classes if no label column does,
    `Task.classes_of`. Without the two, None, no image's size is looked at. in_part: train has bad rows, and may
    have classes that are not known."""
    good: list[int] = []
    bad: list[BadRow] = []
    keys: list[bytes] = []
    labels: list[Any] = []
    classes: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    named: list[list[str]] = []
    digest = hashlib.blake2b(digest_size=16)
    role = label_role(rows.columns)
    there = (column.role for column in rows.columns if column.supervises and column.role in rows.mapping)
    at_fault = role or next(there, None)
    for position, raw in enumerate(rows):
        digest.update(repr([value_of(raw, name) for name in rows.mapping.values()]).encode())
        keys.append(rows.key(raw))
        labels.append(None)
        named.append([])
        try:
            row = rows.read(position, raw=raw)
            measured = rows.measured(row) if count or classes_of else row
            label = row.get(role) if role else _listed(classes_of(measured) if classes_of else None)
            found = _classes_of(label)
            unknown = [name for name in found if known is not None and name not in known]
            if unknown:
                hedge = ", some of whose rows are bad" if in_part else ""
                raise DataError(
                    at_fault,
                    f"label {unknown[0]!r} is not among the {len(known or ())} of train{hedge}."
                    f"{nearest(unknown[0], known or ())}",
                )
            names = list(count(measured)) if count else []
        except DataError as error:
            bad.append(rows.bad(position, error))
            continue
        classes.update(found)
        counted.update(names)
        named[-1] = names
        labels[-1] = label
        good.append(position)
        if progress and position % 256 == 0:
            progress(position, len(rows))
    return Checked(
        np.asarray(good, dtype=np.int64), bad, keys, labels, classes, counted, named, digest.hexdigest()
    )


def label_role(columns: Sequence[Column]) -> str | None:
    return next((column.role for column in columns if column.kind in ("label", "labels")), None)


def _listed(names: Iterable[str] | None) -> list[str] | None:
    return None if names is None else list(names)


def _classes_of(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def sort_classes(names: Sequence[str]) -> list[str]:
    """Class names in the order of their ids: whole numbers by value, else by name."""
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def hold_out(checked: Checked, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions of train and of valid among the good rows: a share of each class, by the hash of the inputs.

    The same rows are held out whatever the seed or the order of the file, and equal inputs stay on one side.
    Raises DataError if nothing is left for one of the sides.
    """
    groups: dict[bytes, list[int]] = {}
    for position in checked.good.tolist():
        groups.setdefault(checked.keys[position], []).append(position)
    strata: dict[str, list[tuple[bytes, list[int]]]] = {}
    for key, positions in groups.items():
        labels = [checked.labels[position] for position in positions]
        stratum = min(label if isinstance(label, str) else "" for label in labels)
        strata.setdefault(stratum, []).append((key, positions))
    quotas = _quotas({name: sum(len(rows) for _, rows in members) for name, members in strata.items()}, share)
    train: list[int] = []
    valid: list[int] = []
    for name, members in strata.items():
        room = quotas[name]
        for _, positions in sorted(members):
            held_out = len(positions) <= room
            room -= len(positions) if held_out else 0
            (valid if held_out else train).extend(positions)
    if not valid or not train:
        raise DataError(
            None, f"data.valid: a share of {share:g} of {len(checked.good)} rows leaves nothing to validate on"
        )
    return np.sort(train), np.sort(valid)


def _quotas(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """Rows to hold out of each class: its share rounded down, the rest to the largest remainders, so that the sum
    is the share of all rows, at least one. No class gives its last row away."""
    quotas = {name: min(int(share * size), size - 1) for name, size in sizes.items()}
    missing = max(1, round(share * sum(sizes.values()))) - sum(quotas.values())
    by_remainder = sorted(sizes, key=lambda name: (int(share * sizes[name]) - share * sizes[name], name))
    for name in [name for name in by_remainder if quotas[name] < sizes[name] - 1][: max(0, missing)]:
        quotas[name] += 1
    return quotas


class Encoded:
    """Samples of rows. Text is encoded once and kept; images and audio are decoded anew for each use.

    owner: int64 [samples], the position of each sample's row. costs: int64 [samples]. sides: `Sample.sides` of
    each sample, None where samples have but a length. truncated: samples cut, by the role of the column that was
    cut; "" where a task names none. supervised: False where the rows are only to be predicted.
    """

    def __init__(self, rows: Rows, task: Task, bundle: Bundle, train: bool, supervised: bool = True):
        self.rows, self.task, self.bundle, self.train, self.supervised = rows, task, bundle, train, supervised
        self.varies = train and overrides(task, "vary")
        self.keep = media_kind(rows.columns) is None and not self.varies
        self.bad: list[BadRow] = []
        self.owner: list[int] = []
        self.costs: list[int] = []
        self.sides: list[tuple[int, int]] | None = []
        self.truncated: Counter[str] = Counter()
        self._part: list[int] = []
        self._kept: list[Sample] = []

    def fill(self, progress: Progress | None = None) -> Encoded:
        """Encodes every row once, which finds every bad row."""
        for position, raw in enumerate(self.rows):
            try:
                samples = self._encode(position, raw)
            except DataError as error:
                self.bad.append(self.rows.bad(position, error))
                continue
            for part, sample in enumerate(samples):
                self.owner.append(position)
                self._part.append(part)
                self.costs.append(sample.cost)
                if sample.sides is None:
                    self.sides = None
                elif self.sides is not None:
                    self.sides.append(sample.sides)
                cut = sample.truncated if isinstance(sample.truncated, Mapping) else {"": sample.truncated}
                self.truncated.update(role for role, units in cut.items() if units > 0)
                if self.keep:
                    self._kept.append(_compact(sample))
            if progress and position % 64 == 0:
                progress(position, len(self.rows))
        return self

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def usable_rows(self) -> int:
        return len(self.rows) - len(self.bad)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int, draw: Sequence[int] | None = None) -> Sample:
        """A sample. draw: numbers that decide, with the index, how `Task.vary` changes it; None: not at all."""
        if self.keep:
            return self._kept[index]
        position = self.owner[index]
        random = np.random.default_rng([*draw, index]) if draw is not None and self.varies else None
        try:
            return self._encode(position, self.rows.raw(position), random)[self._part[index]]
        except DataError as error:  # it was whole when the run began
            raise BadRows([self.rows.bad(position, error)]) from error

    def reference(self, index: int) -> dict[str, Any]:
        """The row of a sample, by role, masks opened, images and audio not: what a meter compares a prediction
        with."""
        return self.rows.with_masks(self.rows.read(self.owner[index]))

    def _encode(
        self, position: int, raw: Mapping[str, Any], random: np.random.Generator | None = None
    ) -> list[Sample]:
        row = self.rows.read(position, media=True, raw=raw)
        row = row if self.supervised else self.task.to_predict(row)
        row = row if random is None else self.task.vary(row, random)
        samples = self.task.encode(row, self.bundle, self.train)
        return samples if isinstance(samples, list) else [samples]


def _compact(sample: Sample) -> Sample:
    """Token ids need 4 bytes, not 8; collation widens them again."""
    tensors = {
        name: array.astype(np.int32)
        if array.dtype == np.int64 and (array.size == 0 or abs(array).max() < 2**31)
        else array
        for name, array in sample.tensors.items()
    }
    return replace(sample, tensors=tensors)


def settle(bad: Sequence[BadRow], total: int, on_error: str, max_skip: float) -> None:
    """Stops at bad rows, or lets a few be left out. Raises BadRows with all of them."""
    if not bad:
        return
    bad = sorted(bad, key=lambda row: (row.file, row.row))
    if on_error == "stop":
        raise BadRows(bad, "Mend them, or leave up to data.max_skip of them out with data.on_error=skip.")
    if len(bad) > max_skip * total:
        raise BadRows(bad, f"That is more than data.max_skip {max_skip:.1%} of {total} rows.")
