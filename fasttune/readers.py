"""From a path or hub id to a table of rows, through Hugging Face `datasets`: mapped from disk, not loaded.

What `datasets` reports poorly is checked first, with line numbers: encoding, broken JSON, headers.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fasttune.errors import DataError
from fasttune.layouts import SPLITS, Opened, Place, named_splits
from fasttune.media import MEDIA_SUFFIXES

if TYPE_CHECKING:
    from datasets import Dataset

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_SPLITS = frozenset({"eval", *(name for names in SPLITS.values() for name in names)})
_NAMED_SPLIT = re.compile(r"(?P<path>.+):(?P<split>[\w.-]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")
_SAVED = ("dataset_dict.json", "state.json")  # what `datasets` leaves in its folders
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MAX_FIELD_CHARACTERS = 2**31 - 1  # csv's own default of 131,072 is less than one long document


Opener = Callable[[Place], Opened | None]  # `Task.open`


class MixedRows(list[dict[str, Any]]):
    """Rows that one column may hold several types in: Arrow can't hold them, yet each bad row is to be named, with
    all other bad rows."""

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(key for row in self for key in row))


@dataclass(frozen=True)
class Table:
    """Rows as they stand in the source.

    name: what messages call it. root: the folder that media paths are relative to and must stay in, or None.
    text_only: every value is text (csv, tsv), so that types are a matter of reading.
    valid: where this is the train split of several, the spec of the validation split beside it. notes: what the
    user should know.
    """

    name: str
    dataset: Dataset | MixedRows
    root: Path | None = None
    text_only: bool = False
    valid: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)


def read(
    spec: str,
    media: Literal["image", "audio"] | None = None,
    split: str = "train",
    opener: Opener | None = None,
    root: str | None = None,
) -> Table:
    """Opens a table: a file, a folder of images or audio, a folder that `datasets` saved, a layout that the task
    knows, or a hub id.

    media: what the task reads from files, if anything. split: the part to take, where the data have several and
    the spec names none (`PATH:SPLIT`, `id:split`). opener: `Task.open`. root: the folder that paths of media are
    relative to; None: the table's own. Raises DataError.
    """
    folder = None if root is None else Path(root).expanduser()
    if folder and not folder.is_dir():
        raise DataError(None, f"data.root: no such folder: {root}")
    name, named = _split_named(spec)
    path = Path(name).expanduser()
    is_local = path.is_dir() or path.is_file()
    opened = _read_layout(Place(path, named or split, root=folder), name, opener) if is_local else None
    if opened:
        table = _table_of(opened, path, name)
    elif not is_local:
        if path.suffix.lower() in {*_DELIMITERS, *_FORMATS} or not _HUB_ID.fullmatch(spec):
            raise DataError(None, f"{spec}: no such file or folder")
        table = _read_hub(spec, split)
    elif path.is_dir():
        table = _read_folder(path, name, media)
    else:
        table = _read_file(path, name)
    if named and table.name == name:
        raise DataError(None, f"{spec}: {name} has no splits to name; leave ':{named}' out")
    if len(table.dataset) == 0:
        raise DataError(None, f"{spec}: has no rows")
    return table if folder is None or opened else replace(table, root=folder)


def _split_named(spec: str) -> tuple[str, str | None]:
    """(path, split) of `PATH:SPLIT`; (spec, None) where a file bears that very name, or none is there at all."""
    parts = _NAMED_SPLIT.fullmatch(spec)
    if parts and not Path(spec).expanduser().exists() and Path(parts["path"]).expanduser().exists():
        return parts["path"], parts["split"]
    return spec, None


def _read_layout(place: Place, name: str, opener: Opener | None) -> Opened | None:
    """What the task makes of a place that is no table and has none with it; None if it doesn't know the layout."""
    path = place.path
    if opener is None or (path.is_dir() and any((path / file).is_file() for file in (*_SAVED, *_METADATA))):
        return None
    if path.is_file():
        document = _read_document(path, name)
        if document is None and path.suffix.lower() in {*_DELIMITERS, *_FORMATS}:
            return None
        place = replace(place, document=document)
    try:
        return opener(place)
    except DataError as error:
        raise DataError(None, f"{name}: {error}") from error
    except OSError as error:
        raise DataError(None, f"{name}: can't be read: {error}") from error


def _table_of(opened: Opened, path: Path, name: str) -> Table:
    """valid: no other split than the one for validation, beside the one for training."""
    beside = named_splits("validation", opened.splits)
    is_train = opened.split is not None and opened.split in named_splits("train", opened.splits)
    return Table(
        f"{name}:{opened.split}" if opened.split else name,
        MixedRows(opened.rows),
        opened.root or (path if path.is_dir() else path.resolve().parent),
        valid=f"{name}:{beside[0]}" if is_train and len(beside) == 1 else None,
        notes=opened.notes,
    )


def _read_file(path: Path, name: str) -> Table:
    suffix = path.suffix.lower()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DataError(None, f"{name}: can't be read: {error.strerror}") from error
    if size == 0:
        raise DataError(None, f"{name}: the file is empty")
    root = path.resolve().parent
    if suffix in _DELIMITERS:
        return Table(name, _read_delimited(path, name, _DELIMITERS[suffix]), root, text_only=True)
    if suffix not in _FORMATS:
        known = ", ".join([*_DELIMITERS, *_FORMATS])
        raise DataError(None, f"{name}: format {suffix or 'without a suffix'!r} is not known. Known: {known}")
    if _FORMATS[suffix] == "json" and _json_is_mixed(path, name):
        with path.open(encoding="utf-8-sig") as file:
            return Table(name, MixedRows(json.loads(line) for line in file), root)
    return Table(name, _load(_FORMATS[suffix], name, **_file(path)), root)


def _read_document(path: Path, name: str) -> dict[str, Any] | None:
    """What a .json file holds that is one object, not a row a line; None for any other file."""
    if path.suffix.lower() != ".json":
        return None
    with path.open("rb") as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
        second = file.readline().lstrip()
    if first[:1] != b"{" or (first[-1:] == b"}" and second[:1] == b"{"):
        return None
    _check_utf8(path, name)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if second[:1] in (b"", b"{"):  # JSON lines: the broken ones are named all at once
            return None
        raise DataError(
            None, f"{name}, line {error.lineno}: broken JSON: {error.msg} at column {error.colno}"
        ) from error
    except RecursionError as error:
        raise DataError(None, f"{name}: nested too deeply to be read") from error


def _file(path: Path) -> dict[str, str]:
    """The file as `load_dataset` takes it. Its cache goes by time and size, which a copied file may keep: the
    content's hash goes along as the name. The path is a glob pattern there, in which `[a].csv` means `a.csv`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"name": f"content-{digest}", "data_files": glob.escape(str(path.resolve()))}


def _load(builder: str, table_name: str, **arguments: Any) -> Dataset:
    """`datasets.load_dataset` with its own fault, and not the wrapping, in the message."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too
    try:
        return datasets.load_dataset(builder, split=arguments.pop("split", "train"), **arguments)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        reason = re.sub(r"^Error tokenizing data\. (C error: )?", "", str(cause)).strip()
        raise DataError(None, f"{table_name}: can't be read: {reason}") from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise DataError(None, f"{table_name}: can't be read: {error}") from error


def _read_delimited(path: Path, name: str, delimiter: str) -> Dataset:
    from datasets import Features, Value

    _check_utf8(path, name)
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, [])
        lengths = [(reader.line_num, len(record)) for record in reader if record]
    faults = [
        f"{name}, line {line}: expected {len(header)} fields as in the header, found {found}; "
        "a field that holds the delimiter needs double quotes"
        for line, found in lengths
        if found != len(header)
    ]
    _raise_faults(faults)
    if not lengths:
        raise DataError(None, f"{name}: has a header and no rows")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated or "" in header:
        fault = f"{repeated[0]!r} stands twice" if repeated else "a column has no name"
        raise DataError(None, f"{name}: the header is wrong: {fault}")
    # Every value as text: "NA" and "null" are words that people write, and 007 is no number.
    features = Features({column: Value("string") for column in header})
    return _load(
        "csv",
        name,
        **_file(path),
        sep=delimiter,
        features=features,
        encoding="utf-8-sig",
        keep_default_na=False,
        na_filter=False,
    )


def _check_utf8(path: Path, name: str) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            _decode(line, name, number)


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start : error.start + 1].hex()
        raise DataError(
            None, f"{name}, line {number}: not UTF-8 text: byte 0x{bad} at position {error.start + 1} of the line"
        ) from error


def _raise_faults(faults: list[str]) -> None:
    if faults:
        more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError(None, "\n".join(faults[:20]) + more)


def _json_is_mixed(path: Path, name: str) -> bool:
    """Checks JSON objects, one a line, or one array of objects in a .json file: all broken lines are named at
    once. True if a column holds values of several types."""
    if path.suffix.lower() == ".json":
        _check_utf8(path, name)
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(4096).lstrip()
        if start.startswith("["):
            _check_json_array(path, name)
            return False
    faults: list[str] = []
    types: dict[str, set[type]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = _parse_row(_decode(line, name, number).removeprefix("\ufeff"))
            except ValueError as error:
                faults.append(f"{name}, line {number}: {error}")
                continue
            for key, value in row.items():
                if value is not None:
                    types.setdefault(key, set()).add(float if type(value) is int else type(value))
    _raise_faults(faults)
    return any(len(found) > 1 for found in types.values())


def _parse_row(text: str) -> dict[str, Any]:
    if not text.strip():
        raise ValueError("is blank; expected a JSON object")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _check_json_array(path: Path, name: str) -> None:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(None, f"{name}, line {error.lineno}: broken JSON: {error.msg}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(None, f"{name}: expected an array of objects, a row each")


def _read_folder(path: Path, name: str, media: Literal["image", "audio"] | None) -> Table:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        listed = ", ".join(str(Path(name) / split) for split in splits)
        raise DataError(None, f"{name}: holds several splits; name one of them: {listed}")
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        try:
            return Table(name, datasets.load_from_disk(str(path)), path)
        except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are ValueErrors
            raise DataError(None, f"{name}: can't be read: {error}") from error
    described = next((path / file for file in _METADATA if (path / file).is_file()), None)
    if described:
        table = _read_file(described, str(Path(name) / described.name))
        return Table(table.name, table.dataset, path, table.text_only)
    if media is None:
        raise DataError(None, f"{name}: is a folder; expected a table: {', '.join([*_DELIMITERS, *_FORMATS])}")
    return Table(name, _list_classes(path, name, media), path)


def _list_classes(path: Path, name: str, media: Literal["image", "audio"]) -> Dataset:
    """A folder a class: every media file below a first-level folder bears that folder's name as its label."""
    from datasets import Dataset

    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if classes and all(entry.name.lower() in _SPLITS for entry in classes):
        listed = ", ".join(str(Path(name) / entry.name) for entry in classes)
        raise DataError(None, f"{name}: holds splits, not classes; name one of them: {listed}")
    files, labels, others = [], [], []
    for folder in classes:
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or file.name.startswith("."):
                continue
            if file.suffix.lower() in MEDIA_SUFFIXES[media]:
                files.append(str(file.relative_to(path)))
                labels.append(folder.name)
            else:
                others.append(str(file.relative_to(path)))
    if not files:
        kinds = ", ".join(sorted(MEDIA_SUFFIXES[media]))
        raise DataError(
            None,
            f"{name}: expected a folder a class with {media} files ({kinds}), or one of {', '.join(_METADATA)}; "
            f"found {len(classes)} folders without any",
        )
    if others:
        raise DataError(None, f"{name}: {len(others)} files are no {media} files, the first: {others[0]}")
    return Dataset.from_dict({media: files, "label": labels})


def _read_hub(spec: str, split: str) -> Table:
    identifier, *rest = spec.split(":")
    config = rest[0] if len(rest) == 2 else None
    if rest:
        split = rest[-1]
    return Table(
        spec,
        _load(identifier, f"{spec} (no local file or folder, so taken for a hub id)", name=config, split=split),
    )
