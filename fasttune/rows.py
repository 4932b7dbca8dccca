"""Rows by role: the columns of a table mapped to what the task reads, and every value checked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fasttune.errors import BadRow, DataError, nearest
from fasttune.media import Limits, image_size, locate, open_audio, open_image, open_mask
from fasttune.readers import Table
from fasttune.task import Column

_MEDIA = ("image", "audio", "mask")
_OPENERS = {"image": open_image, "audio": open_audio, "mask": open_mask}
# Python's float() takes 1_0 for ten; people don't. nan and inf are let through to be named as such.
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.ASCII | re.IGNORECASE)


def media_kind(columns: Sequence[Column]) -> Any:
    """ "image" or "audio" if the task reads such files, else None. Masks are read beside images."""
    return next((column.kind for column in columns if column.kind in ("image", "audio")), None)


def map_columns(table: Table, columns: Sequence[Column], named: Mapping[str, str]) -> dict[str, str]:
    """The table's column for each role: the one named in data.columns, else the role's own name, else an alias.

    A name with dots leads into a column of mappings: "translation.en". An alias counts only where the column's
    type can hold the role's kind: what is called "label" may be a class or a mask. Raises DataError with the
    nearest name.
    """
    roles = [column.role for column in columns]
    for role, name in named.items():
        if role not in roles:
            raise DataError(
                None,
                f"data.columns: the task has no role {role!r}.{nearest(role, roles)} Roles: {', '.join(roles)}",
            )
        if name.partition(".")[0] not in table.columns and name not in table.columns:
            raise DataError(
                None, f"{table.name}: no column {name!r}.{nearest(name, table.columns)} {_columns_of(table)}"
            )
    folded = {name.casefold(): name for name in reversed(table.columns)}
    mapping = dict(named)
    for column in columns:
        if column.role in mapping:
            continue
        known = (
            (alias, alias if alias in table.columns else folded.get(alias.casefold())) for alias in column.names
        )
        fitting = (
            name
            for alias, name in known
            if name and (alias == column.role or _may_hold(_feature(table, name), column.kind))
        )
        found = next((name for name in fitting if name not in mapping.values()), None)
        if found:
            mapping[column.role] = found
        elif column.required:
            raise DataError(
                None,
                f"{table.name}: no column for {column.role!r} ({column.kind})."
                f"{nearest(column.role, table.columns)} {_columns_of(table)} "
                f"Name it with data.columns.{column.role}=COLUMN",
            )
    return mapping


def value_of(raw: Mapping[str, Any], name: str) -> Any:
    """What a row holds under a column's name, or inside a column of mappings; None if nothing."""
    if name in raw:
        return raw[name]
    outer, dot, inner = name.partition(".")
    held = raw.get(outer) if dot else None
    return value_of(held, inner) if isinstance(held, Mapping) else None


def _by_role(columns: Sequence[Column], role: str) -> Column:
    return next(column for column in columns if column.role == role)


def _columns_of(table: Table) -> str:
    notes = f" ({'; '.join(table.notes)})" if table.notes else ""
    return f"Columns: {', '.join(table.columns)}.{notes}"


def _label_name(value: Any) -> str:
    """A class name from what stands in the data."""
    match value:
        case bool():
            return str(value).lower()
        case str() if value.strip():
            return value.strip()
        case int():
            return str(value)
        case float():
            raise ValueError(f"expected a class (text or a whole number), found the float {value}")
        case None | str():
            raise ValueError("expected a class, found none")
    raise ValueError(f"expected a class (text or a whole number), found {type(value).__name__} {value!r:.60}")


def _label_names(value: Any) -> list[str]:
    """Class names from a list, or from text: a JSON array, or names between `|`, `;` or `,`."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            value = json.loads(text)
        else:
            separator = next((mark for mark in "|;," if mark in text), "|")
            value = [part for part in text.split(separator) if part.strip()]
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise ValueError(f"expected a list of classes, found {value!r:.60}")
    return sorted({_label_name(item) for item in value})


def _text(value: Any) -> str:
    if value is None:
        raise ValueError("expected text, found nothing (null)")
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError("expected text, found only blanks" if value else "expected text, found an empty string")
    return value


def _number(value: Any) -> float:
    if value is None or isinstance(value, bool) or value == "":
        raise ValueError(f"expected a number, found {'nothing' if value in (None, '') else value}")
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise ValueError(f"expected a number, found {value!r:.60}")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a number, found {value!r:.60}") from error
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {value}")
    return number


_READ: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "label": _label_name,
    "labels": _label_names,
    "number": _number,
}


@dataclass(frozen=True)
class Rows:
    """Some rows of a table, seen by role. indices: int64 [n], positions in the table."""

    table: Table
    columns: tuple[Column, ...]
    mapping: Mapping[str, str]
    indices: np.ndarray
    limits: Limits = field(default_factory=Limits)
    _decoders: Mapping[str, Callable[[Any], Any]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_decoders", {role: self._decoder(role) for role in self.mapping})

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, positions: np.ndarray | Sequence[int]) -> Rows:
        return replace(self, indices=self.indices[np.asarray(positions, dtype=np.int64)])

    def number(self, position: int) -> int:
        """The row's number in its file, from 1, without a header."""
        return int(self.indices[position]) + 1

    def bad(self, position: int, error: DataError) -> BadRow:
        column = self.mapping.get(error.column, error.column) if error.column else None
        return BadRow(self.table.name, self.number(position), column, error.why, self._media_path(position))

    def _media_path(self, position: int) -> str | None:
        """Of the first column of images or audio that names a file."""
        for column in self.columns:
            if column.kind in ("image", "audio") and column.role in self.mapping:
                value = value_of(self.raw(position), self.mapping[column.role])
                path = value.get("path") if isinstance(value, Mapping) else value
                if isinstance(path, str) and 0 < len(path) < 256:  # not a picture as text
                    return path
        return None

    def raw(self, position: int) -> dict[str, Any]:
        """The row as it stands in the table."""
        return self.table.dataset[int(self.indices[position])]

    def read(self, position: int, *, media: bool = False, raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The row by role, values checked. media: open images, masks and audio, else leave them as they stand.

        Raises DataError for a value that is not of its column's kind, and for a mask of another size than its
        image.
        """
        raw = self.raw(position) if raw is None else raw
        row: dict[str, Any] = {}
        for column in self.columns:
            if column.role not in self.mapping:
                continue
            value = value_of(raw, self.mapping[column.role])
            if isinstance(value, DataError):  # the layout's reader found it
                raise DataError(value.column or column.role, value.why)
            if value is None and not column.required:
                continue
            if column.kind in _MEDIA:
                row[column.role] = self._open(column, value) if media else value
                continue
            try:
                row[column.role] = self._decoders[column.role](value)
            except ValueError as error:
                raise DataError(column.role, str(error)) from error
        if media:
            self._masks_must_fit(row, {role: row[role].size for role in self._roles("image", row)})
        return row

    def measured(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row that `read` gave, with (width, height) in the place of each image, from the file's header, and its
        masks opened.

        Raises DataError for a file that is no image, and for a mask of another size than its image."""
        sizes = {
            role: image_size(row[role], role, self.table.root, self.limits) for role in self._roles("image", row)
        }
        opened = self.with_masks(row)
        self._masks_must_fit(opened, sizes)
        return {**opened, **sizes}

    def with_masks(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row that `read` gave, with its masks opened."""
        masks = [column for column in self.columns if column.kind == "mask" and column.role in row]
        return {**row, **{column.role: self._open(column, row[column.role]) for column in masks}}

    def _roles(self, kind: str, row: Mapping[str, Any]) -> list[str]:
        return [column.role for column in self.columns if column.kind == kind and column.role in row]

    def _masks_must_fit(self, row: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raises DataError for a mask that has not the size of the row's images."""
        for role in self._roles("mask", row):
            size = row[role].size
            for image, expected in sizes.items():
                if size != expected:
                    found = f"{size[0]} x {size[1]} pixels; the {image} has {expected[0]} x {expected[1]}"
                    raise DataError(role, f"the mask has {found}, both after their EXIF rotation")

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Raw rows, in order; faster than `raw` one by one."""
        whole = len(self) == len(self.table.dataset) and bool((np.diff(self.indices) == 1).all())
        if whole or not hasattr(self.table.dataset, "select"):
            source = self.table.dataset
            yield from (source if whole else (source[int(i)] for i in self.indices))
        else:
            yield from self.table.dataset.select(self.indices)

    def key(self, raw: Mapping[str, Any]) -> bytes:
        """A hash of what the model sees of a row: its inputs, the bytes of its files, without its targets."""
        digest = hashlib.blake2b(digest_size=16)
        for column in self.columns:
            if column.supervises or column.role not in self.mapping:
                continue
            value = value_of(raw, self.mapping[column.role])
            if column.kind in _MEDIA:
                value = self._bytes(column, value)
            digest.update(repr(value).encode())
        return digest.digest()

    def _bytes(self, column: Column, value: Any) -> Any:
        """What a media column's file holds; the value itself if there is no such file."""
        try:
            source = locate(value, column.role, self.table.root)
        except DataError:  # `read` names the fault
            return value
        return source.read_bytes() if isinstance(source, Path) else source.getvalue()

    def _open(self, column: Column, value: Any) -> Any:
        return _OPENERS[column.kind](value, column.role, self.table.root, self.limits)

    def _decoder(self, role: str) -> Callable[[Any], Any]:
        column = _by_role(self.columns, role)
        read = _READ.get(column.kind, lambda value: value)
        if column.kind == "json":
            return _naming(_feature(self.table, self.mapping[role])) or read
        if column.kind in ("label", "labels"):
            names = _class_names(self.table, self.mapping[role])
            if names:
                return lambda value: read(_named(value, names))
            if (
                column.kind == "label"
                and self.table.text_only
                and _holds_fractions(self.table, self.mapping[role])
            ):
                return lambda value: _label_name(float(value) if value.strip() else value)
        return read


def open_rows(
    table: Table,
    columns: Sequence[Column],
    named: Mapping[str, str],
    limits: Limits,
) -> Rows:
    """All rows of a table, by role. Raises DataError if a column is missing."""
    import datasets

    mapping = map_columns(table, columns, named)
    dataset = table.dataset
    for column in columns:
        if column.kind in _MEDIA and column.role in mapping and isinstance(dataset, datasets.Dataset):
            feature = dataset.features.get(mapping[column.role])
            if isinstance(feature, (datasets.Image, datasets.Audio)):  # opened here, within limits
                dataset = dataset.cast_column(mapping[column.role], type(feature)(decode=False))
    table = replace(table, dataset=dataset)
    return Rows(table, tuple(columns), mapping, np.arange(len(dataset)), limits)


def _feature(table: Table, name: str) -> Any:
    """The type that `datasets` knows for a column, or for a field inside one; None if it knows none."""
    held = getattr(table.dataset, "features", {})
    while isinstance(held, Mapping) and name not in held and "." in name:
        outer, _, name = name.partition(".")
        held = held.get(outer)
    return held.get(name) if isinstance(held, Mapping) else None


def _may_hold(feature: Any, kind: str) -> bool:
    """Whether a column of this type, as `datasets` knows it, may hold such values; None: nothing is known."""
    import datasets

    if feature is None:
        return True
    if kind == "json":
        return not isinstance(feature, (datasets.Image, datasets.Audio))
    if kind in ("mask", "image") and not isinstance(feature, datasets.Image):
        of_paths = getattr(feature, "dtype", None) in ("string", "large_string", "string_view", "null")
        return of_paths or (isinstance(feature, Mapping) and feature.keys() <= {"path", "bytes"})
    return True


def _naming(feature: Any) -> Callable[[Any], Any] | None:
    """What puts names in the place of class ids, at any depth of a value of this type; None if it holds none."""
    if names := getattr(feature, "names", None):
        return lambda value: _named(value, names)
    if isinstance(feature, Mapping):
        found = {key: naming for key, inner in feature.items() if (naming := _naming(inner))}
        if not found:
            return None
        return lambda value: (
            value and {key: found[key](held) if key in found else held for key, held in value.items()}
        )
    inner = _naming(feature.feature) if hasattr(feature, "feature") else None
    return inner and (lambda value: value and [inner(item) for item in value])


def _class_names(table: Table, name: str) -> list[str] | None:
    """The names of a ClassLabel column, or of a list of them."""
    feature = getattr(table.dataset, "features", {}).get(name)
    feature = getattr(feature, "feature", feature)
    return getattr(feature, "names", None)


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_named(item, names) for item in value]
    if isinstance(value, int):
        if not 0 <= value < len(names):
            raise ValueError(f"expected a class from 0 to {len(names) - 1}, found {value}")
        return names[value]
    return value


def _holds_fractions(table: Table, name: str) -> bool:
    """Whether a text column is one of numbers, some of them written as fractions: 3.5 or 3.0."""
    fractions = False
    for row in table.dataset:
        text = row[name].strip()
        if not text:
            continue
        if not _NUMBER.fullmatch(text):
            return False
        fractions = fractions or not text.lstrip("+-").isdecimal()
    return fractions
