"""What the layouts share: files found and read inside a root, class lists, and the faults of a row as one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttune.errors import DataError
from fasttune.layouts import named_splits

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_SHOWN = 5  # faults of one image; whoever mends them finds the others
_LISTED = 8  # classes of a message
_MOST_BYTES = 64 * 2**20  # of a file of labels; the largest set's list of images is a tenth of it


def images_in(folder: Path) -> Iterator[Path]:
    """The image files below a folder, sorted; links to folders are not followed, hidden ones not looked into."""
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(at, name)


def is_inside(path: Path, root: Path) -> bool:
    """Whether no `..` or link leads the path out of the root."""
    return path.resolve().is_relative_to(root.resolve())


def below(path: Path, root: Path) -> str:
    """The path as rows name it: relative to the root where it lies below it as written, else whole."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())


def read_bytes(path: Path, root: Path) -> bytes:
    """Raises DataError(None, why) for a file that lies outside the root, is none, or is too large to be labels."""
    said = below(path, root)
    if not is_inside(path, root):
        raise DataError(None, f"{said} leads out of {root} (data.root names another folder)")
    if not path.is_file():
        raise DataError(None, f"{said}: {'is no file' if path.exists() else 'no such file'}")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise DataError(None, f"{said}: {size:,} bytes, more than the {_MOST_BYTES:,} that are read")
    return path.read_bytes()


def read_text(path: Path, root: Path) -> str:
    """UTF-8 text, a mark at its beginning left out. Raises what `read_bytes` does."""
    try:
        return read_bytes(path, root).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(None, f"{below(path, root)}: not UTF-8 text at byte {error.start}") from error


def objects_or_fault(objects: Mapping[str, Any], faults: Sequence[str]) -> Mapping[str, Any] | DataError:
    """The row's objects, or what is wrong with them."""
    if not faults:
        return objects
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return DataError("objects", "; ".join(faults[:_SHOWN]) + more)


def listed(names: Mapping[Any, str]) -> str:
    """A class list for a message."""
    shown = ", ".join(f"{key} ({name})" for key, name in list(names.items())[:_LISTED])
    return f"the {len(names)} classes: {shown}{', …' if len(names) > _LISTED else ''}"


def notes_on_absent(names: Iterable[str], seen: Iterable[str], split: str) -> tuple[str, ...]:
    """Classes of a list that none of the objects to train on has: the host knows classes by objects alone."""
    if named_splits("validation", [split]) or named_splits("test", [split]):
        return ()
    stated, held = set(names), set(seen)
    absent = sorted(stated - held)
    if not absent:
        return ()
    more = ", …" if len(absent) > _LISTED else ""
    return (
        f"{len(absent)} of the {len(stated)} classes that it names have no object: "
        f"{', '.join(absent[:_LISTED])}{more}; a model that is trained on it won't know them",
    )


def notes_on_names(names: Mapping[Any, str]) -> tuple[str, ...]:
    """Class ids that share a name are one class, which may not be what was meant."""
    return tuple(
        f"class ids {', '.join(str(key) for key, held in names.items() if held == name)} are all named {name!r} "
        "and become one class"
        for name, count in Counter(names.values()).items()
        if count > 1
    )
