"""Everything before the first step: task, rows, splits, model and samples, with every bad row found."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fasttune import task as tasks
from fasttune.adapt import DTYPES, Adapted, adapt
from fasttune.config import SHARE_HELD_OUT, RunConfig, validate_options
from fasttune.data import Checked, ClassesOf, Count, Encoded, check, hold_out, settle, sort_classes
from fasttune.errors import BadRow, BadRows, DataError
from fasttune.media import Limits
from fasttune.progress import Progress
from fasttune.readers import Table, read
from fasttune.rows import Rows, media_kind, open_rows
from fasttune.signals import Signals
from fasttune.task import Bundle, Plugin, Source, Task, overrides

UNITS = {"image": "pixels", "audio": "samples", None: "tokens"}


@dataclass
class Prepared:
    """A run that is ready for its first step. valid_from: as in `Tables`. skipped: bad rows that data.on_error let
    be left out."""

    plugin: Plugin
    task: Task
    labels: list[str]
    classes: Counter[str]
    bundle: Bundle
    train: Encoded
    valid: Encoded
    fingerprint: dict[str, str]
    valid_from: float | str
    skipped: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_task(config: RunConfig) -> tuple[Plugin, Task]:
    """The task that the run names, with its options. Raises PluginError or ConfigError."""
    plugin = tasks.find(config.task)
    kind = tasks.load(plugin)
    return plugin, kind(validate_options(kind.Options, config.options, config.task))


def source_of(config: RunConfig, remote_code: str | None = None) -> Source:
    """The model's source. remote_code: "repo@commit", whose code the user allows to run, if it is this model's."""
    source = Source(config.model)
    source.random_weights = config.weights == "random"
    repo, _, commit = (remote_code or "").rpartition("@")
    if repo == config.model:
        source.remote_code_revision = commit
    return source


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_bundle(task: Task, source: Source, labels: list[str], seed: int) -> Bundle:
    """The model with its new head; equal seeds give equal heads."""
    seed_everything(seed)
    return task.build(source, labels)


def width_of(bundle: Bundle) -> int | None:
    """The model's hidden size, if it has one (a convolutional network has several)."""
    config: Any = getattr(bundle.model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(inner, "hidden_size", None)
    return width if isinstance(width, int) else None


def adapt_bundle(config: RunConfig, bundle: Bundle, device: torch.device) -> Adapted:
    """The bundle's model, made trainable as the run asks."""
    return adapt(
        bundle,
        config.strategy,
        dtype=DTYPES[config.train.precision],
        device=device,
        attention_implementation=config.train.attention,
        checkpointing=config.train.activation_checkpointing,
    )


@dataclass
class Tables:
    """Rows of train and valid after the first look, before any model is loaded. valid_from: what data.valid says,
    or stands for if it says nothing."""

    train: Rows
    valid: Rows
    bad: list[BadRow]
    total: int
    classes: Counter[str]
    counted: Counter[str]
    fingerprint: dict[str, str]
    valid_from: float | str
    notes: list[str]


def open_tables(config: RunConfig, task: Task, progress: Progress, signals: Signals) -> Tables:
    """Reads and checks train and valid, and holds valid out of train if it is a share."""

    def look(rows: Rows, known: set[str] | None = None, in_part: bool = False) -> Checked:
        def report(done: int, total: int) -> None:
            signals.poll("reading data")
            progress.preparing(f"reading {rows.table.name}", done, total)

        return check(rows, known, report, *looks(task), in_part)

    limits = Limits(config.data.max_pixels, config.data.max_audio_seconds)
    media = media_kind(task.columns)

    def open_split(spec: str, split: str) -> Rows:
        table = read(spec, media, split, task.open, config.data.root)
        opened = open_rows(table, task.columns, config.data.columns, limits)
        _check_columns(task, opened)
        return opened

    rows = open_split(config.data.train, "train")
    valid = rows.table.valid or SHARE_HELD_OUT if config.data.valid is None else config.data.valid
    other = open_split(valid, "validation") if isinstance(valid, str) else None
    first = look(rows)
    notes = ["columns: " + ", ".join(f"{role} <- {name}" for role, name in rows.mapping.items())]
    for table in (rows.table, *([other.table] if other else [])):
        notes += [f"{table.name}: {note}" for note in table.notes]
    if other is None:
        try:
            train_at, valid_at = hold_out(first, float(valid))
        except DataError:  # too few rows are left, perhaps since most are bad
            settle(first.bad, len(rows), "stop", 0.0)
            raise
        classes = Counter(name for at in train_at.tolist() for name in _names(first.labels[at]))
        counted = Counter(name for at in train_at.tolist() for name in first.names[at])
        notes.append(f"valid: {len(valid_at):,} of {len(rows):,} rows held out of train, by hash")
        fingerprint = {"train": first.fingerprint}
        return Tables(
            rows.take(train_at),
            rows.take(valid_at),
            first.bad,
            len(rows),
            classes,
            counted,
            fingerprint,
            valid,
            notes,
        )
    second = look(other, set(first.classes), bool(first.bad))
    known = set(first.keys)
    shared = sum(key in known for key in second.keys)
    if shared:
        notes.append(
            f"warning: {shared:,} rows of valid are in train too; metrics on valid will flatter the model"
        )
    return Tables(
        rows.take(first.good),
        other.take(second.good),
        first.bad + second.bad,
        len(rows) + len(other),
        first.classes,
        first.counted,
        {"train": first.fingerprint, "valid": second.fingerprint},
        valid,
        notes,
    )


def looks(task: Task) -> tuple[Count | None, ClassesOf | None]:
    """`Task.count` and `Task.classes_of`, where the task has one of its own."""
    return (
        task.count if overrides(task, "count") else None,
        task.classes_of if overrides(task, "classes_of") else None,
    )


def _check_columns(task: Task, rows: Rows) -> None:
    """`Task.check_columns`, with the table and its columns in the message."""
    try:
        task.check_columns(frozenset(rows.mapping))
    except DataError as error:
        columns = ", ".join(rows.table.columns)
        raise DataError(None, f"{rows.table.name}: {error.why}. Columns: {columns}.") from error


def _names(label: Any) -> list[str]:
    return [label] if isinstance(label, str) else list(label or ())


def prepare(config: RunConfig, progress: Progress, signals: Signals, remote_code: str | None = None) -> Prepared:
    """Raises the error of whatever is wrong with task, data or model; bad rows all at once."""
    plugin, task = open_task(config)
    tables = open_tables(config, task, progress, signals)
    classes = {name: tables.classes[name] for name in sort_classes(list(tables.classes))}
    try:
        task = type(task)(task.resolve({**classes, **tables.counted}))
    except DataError as error:
        if tables.bad:  # the classes may be what they are because of the bad rows
            settle(tables.bad, tables.total, "stop", 0.0)
        raise DataError(None, f"{tables.train.table.name}: {error}") from error
    signals.poll("reading data")
    bundle = build_bundle(task, source_of(config, remote_code), list(classes), config.train.seed)
    encoded = {}
    for name, rows in (("train", tables.train), ("valid", tables.valid)):

        def report(done: int, total: int, name: str = name) -> None:
            signals.poll("encoding data")
            progress.preparing(f"encoding {name}", done, total)

        encoded[name] = Encoded(rows, task, bundle, train=name == "train").fill(report)
    bad = [*tables.bad, *encoded["train"].bad, *encoded["valid"].bad]
    settle(bad, tables.total, config.data.on_error, config.data.max_skip)
    train, valid = encoded["train"], encoded["valid"]
    for name, samples in encoded.items():
        if not len(samples):
            raise DataError(None, f"data.{name}: no usable row is left")
    notes = [*tables.notes, *bundle.notes, _truncation(train, valid)]
    return Prepared(
        plugin,
        task,
        list(classes),
        tables.classes,
        bundle,
        train,
        valid,
        tables.fingerprint,
        tables.valid_from,
        bad,
        notes,
    )


def truncated_shares(encoded: Encoded) -> float | dict[str, float]:
    """The share of samples that were cut; by role where the task reads several columns."""
    shares = {role: count / len(encoded) for role, count in sorted(encoded.truncated.items())}
    return shares if any(shares) else shares.get("", 0.0)


def _truncation(train: Encoded, valid: Encoded) -> str:
    said = []
    for name, samples in (("train", train), ("valid", valid)):
        shares = truncated_shares(samples)
        if isinstance(shares, dict):
            said += [f"{role} in {share:.1%} of {name}" for role, share in shares.items()]
        else:
            said.append(f"{shares:.1%} of {name}")
    return f"truncated: {' and '.join(said)} rows"


def prepare_rows(
    task: Task, bundle: Bundle, table: Table, named: dict[str, str], limits: Limits, labels: list[str] | None
) -> Encoded:
    """Encoded rows for a trained model; labels: the model's classes if the rows are to be scored, None if they are
    to be predicted, when columns that supervise are not looked at. Raises BadRows with every unusable row."""
    supervised = labels is not None
    columns = [column for column in task.columns if supervised or not column.supervises]
    named = {role: name for role, name in named.items() if role in {column.role for column in columns}}
    rows = open_rows(table, columns, named, limits)
    seen = check(rows, set(labels or ()), classes_of=looks(task)[1] if supervised else None)
    encoded = Encoded(rows.take(seen.good), task, bundle, train=False, supervised=supervised).fill()
    bad = [*seen.bad, *encoded.bad]
    if bad:
        raise BadRows(sorted(bad, key=lambda row: row.row))
    return encoded


def data_report(skipped: list[BadRow]) -> str:
    """data_report.jsonl: a line a row that was left out."""
    return "".join(json.dumps(vars(bad)) + "\n" for bad in skipped)
