"""The files that name a mask's ids: lists, JSON, tables, palettes.

Names go by id, or by colour, "r,g,b", in palettes. None is the name of what is no truth: what such files call
void, unlabelled or ignored.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttune.errors import DataError
from fasttune_detection.places import below, read_text

Names = dict[int | str, str | None]

_VOID = frozenset({"void", "ignore", "ignored", "unlabeled", "unlabelled"})
_NUMBERED = re.compile(r"(-?\d+)\s*[:=,;\t ]\s*(\S.*)")
_CHANNELS = (("r", "g", "b"), ("red", "green", "blue"))
_ID_COLUMNS = ("id", "index", "idx", "value", "pixel value", "label", "class_id")
_NAME_COLUMNS = ("name", "class", "class_name", "label", "category")


def find_names(folders: Iterable[Path], root: Path) -> tuple[Names | None, tuple[str, ...]]:
    """(names, notes) of the first such file in these folders; None if there is none. Raises DataError(None, why)
    for a file that is broken."""
    for folder in dict.fromkeys(folders):
        for name, read in _READERS.items():
            file = folder / name
            if not file.is_file():
                continue
            said = below(file, root)
            try:
                names = read(read_text(file, root))
            except ValueError as error:
                raise DataError(None, f"{said}: {error}") from error
            void = [str(key) for key, name in names.items() if name is not None and name.casefold() in _VOID]
            names = {key: None if str(key) in void else name for key, name in names.items()}
            if not any(names.values()):
                raise DataError(None, f"{said}: names no class")
            notes = [f"class names: {said}"]
            if void:
                notes.append(f"{said}: {', '.join(void)} is called void or the like: no truth")
            return names, tuple(notes)
    return None, ()


def _lines(text: str) -> Names:
    """A name a line, the first of id 0; or an id before each name."""
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines or not lines:
        raise ValueError(f"line {lines.index('') + 1 if lines else 1} is blank; expected a class name")
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(numbered):
        return _once((int(match[1]), match[2].strip()) for match in numbered if match)
    return _once(enumerate(lines))


def _json(text: str) -> Names:
    """{"0": name}, {name: 0}, [name, …] or [{"id", "name"}, …]."""
    try:
        held = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if isinstance(held, list) and all(isinstance(item, Mapping) for item in held):
        return _once((_id(item.get("id")), _name(item.get("name"))) for item in held)
    if isinstance(held, list):
        return _once((i, _name(name)) for i, name in enumerate(held))
    if not isinstance(held, Mapping):
        raise ValueError(f"expected class names by id, found {type(held).__name__}")
    if held and all(type(value) is int for value in held.values()):
        return _once((value, _name(name)) for name, value in held.items())
    return _once((_id(key), _name(name)) for key, name in held.items())


def _table(text: str) -> Names:
    """Columns name and r, g, b (class_dict.csv), or name and id (Roboflow's "Pixel Value, Class")."""
    rows = [
        [field.strip() for field in row] for row in csv.reader(io.StringIO(text), skipinitialspace=True) if row
    ]
    header = [field.casefold() for field in rows[0]] if rows else []
    colours = next((three for three in _CHANNELS if set(three) <= set(header)), None)
    keys = colours or [next((name for name in _ID_COLUMNS if name in header), "")]
    name = next((name for name in _NAME_COLUMNS if name in header and name not in keys), None)
    if name is None or not keys[0]:
        raise ValueError(
            f"expected the columns name, r, g, b, or name and id; found {', '.join(header) or 'none'}"
        )
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"line {number}: expected {len(header)} fields, found {len(row)}")
        held = dict(zip(header, row, strict=True))
        pairs.append((_colour([held[key] for key in keys]) if colours else _id(held[keys[0]]), _name(held[name])))
    return _once(pairs)


def _labelmap(text: str) -> Names:
    """CVAT's: `name:r,g,b:parts:actions` a line, after a comment."""
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *fields = line.split(":")
        if not fields:
            raise ValueError(f"line {number}: expected name:r,g,b, found {line!r:.60}")
        pairs.append((_colour(fields[0].split(",")), _name(name)))
    return _once(pairs)


def _ade20k(text: str) -> Names:
    """ADE20K's objectInfo150.txt: ids from 1 in the first column, names in the last; 0 is what has no class."""
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()]
    return _once([(0, None), *((_id(row[0].strip()), _name(row[-1])) for row in rows)])


_READERS: Mapping[str, Callable[[str], Names]] = {
    "classes.txt": _lines,
    "labels.txt": _lines,
    "class_names.txt": _lines,
    "id2label.json": _json,
    "classes.json": _json,
    "labels.json": _json,
    "class_dict.csv": _table,
    "classes.csv": _table,
    "_classes.csv": _table,
    "labelmap.txt": _labelmap,
    "objectInfo150.txt": _ade20k,
}
NAMES_FILES = tuple(_READERS)


def _once(pairs: Iterable[tuple[int | str, str | None]]) -> Names:
    names: Names = {}
    for key, name in pairs:
        if key in names:
            raise ValueError(f"{key} is named twice, {names[key]} and {name}")
        names[key] = name
    return names


def _id(key: Any) -> int:
    if (isinstance(key, int) and not isinstance(key, bool)) or (
        isinstance(key, str) and re.fullmatch(r"-?[0-9]+", key)
    ):
        return int(key)
    raise ValueError(f"expected an id, a whole number, found {key!r:.40}")


def _name(name: Any) -> str | None:
    if name is None or (isinstance(name, str) and name.strip()):
        return name and name.strip()
    raise ValueError(f"expected a name, or null for no truth, found {name!r:.40}")


def _colour(channels: Sequence[str]) -> str:
    parts = [part.strip() for part in channels]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) < 256 for part in parts):
        raise ValueError(f"expected r,g,b, 0 to 255 each, found {','.join(parts)!r:.40}")
    return ",".join(str(int(part)) for part in parts)
