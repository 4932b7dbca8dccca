"""What can go wrong, by whose fault.

A `FasttuneError` says that the user's input or machine is at fault: the command line prints its message
without a traceback and exits with 2. Anything else that escapes is a bug (exit 1). A message names the file,
row, column or key, what was expected, what was found and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class FasttuneError(Exception):
    """The user's input, plugin or machine is at fault; the message says where and what to do."""

    exit_status = 2


class ConfigError(FasttuneError):
    """A run file, `--set` or keyword argument is wrong."""


class PluginError(FasttuneError):
    """A task is not installed, is broken, is claimed twice, or was made for another contract."""


class ModelError(FasttuneError):
    """A pretrained model can't be loaded, or doesn't fit the task."""


class OutputError(FasttuneError):
    """The output folder is in use, holds another run, or has no room."""


class CheckpointError(FasttuneError):
    """No checkpoint verifies, or the one asked for belongs to another run."""


class TrainingError(FasttuneError):
    """Training can't go on: the loss is not finite, or memory is not enough."""


class Stopped(FasttuneError):
    """A signal asked the run to stop; a checkpoint was written first. Exit status 128 + signal number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum
        self.exit_status = 128 + signum


class DataError(FasttuneError):
    """One value of one row is wrong: raised by a task's `encode`, given its file and row by the host.

    column: the role of the column at fault ("text"), or None if it concerns the whole row or file.
    why: what was expected and what was found.
    """

    def __init__(self, column: str | None, why: str):
        super().__init__(f"{column}: {why}" if column else why)
        self.column = column
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes hand it over pickled
        return type(self), (self.column, self.why)


@dataclass(frozen=True)
class BadRow:
    """One row that can't be used. `row` counts from 1, without the header. media: the path of its image or audio,
    which tells more than a number where rows are files of a folder, or images of a JSON."""

    file: str
    row: int
    column: str | None
    why: str
    media: str | None = None

    def __str__(self) -> str:
        media = f" ({self.media})" if self.media and self.media not in self.why else ""
        column = f", column {self.column!r}" if self.column else ""
        return f"{self.file}, row {self.row}{media}{column}: {self.why}"


class BadRows(DataError):
    """Rows that can't be used: all of them are in `rows`; the message lists the first twenty."""

    SHOWN = 20

    def __init__(self, rows: list[BadRow], hint: str = ""):
        self.rows = rows
        listed = "\n".join(f"  {row}" for row in rows[: self.SHOWN])
        more = f"\n  … and {len(rows) - self.SHOWN} more" if len(rows) > self.SHOWN else ""
        noun = "row" if len(rows) == 1 else "rows"
        hint = f"\n{hint}" if hint else ""
        super().__init__(None, f"{len(rows)} bad {noun}:\n{listed}{more}{hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows,)


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest known word, or "" if nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f" Did you mean {close[0]!r}?" if close else ""
