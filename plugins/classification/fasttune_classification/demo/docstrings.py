"""Labelled text from what is installed: "which library does this docstring come from?".

Sources are parsed and never imported. Library names are masked, duplicates are dropped, and no file
feeds both sides of a split.
"""

import math
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fasttune.docstrings import docstrings

STDLIB = "stdlib"
LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "pandas",
    "huggingface_hub",
    "pydantic",
    "sympy",
    "networkx",
    STDLIB,
)
MIN_LIBRARIES = 5
MIN_CHARACTERS = 60
MAX_CHARACTERS = 500
MAX_FILE_BYTES = 250_000
DUPLICATE_PREFIX = 80
PLACEHOLDER = "_"

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_testing", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    | {"_vendor", "_vendored_packages", "vendor", "externals", "third_party", "__pycache__", "pip"}
)

# Names as substrings, then short forms which would also match inside ordinary words ("arrow" in "narrow").
_NAMES = (
    r"py_?torch|torch|transformers|datasets|numpy|pandas|py_?arrow|hugging[\s_-]?face(?:[\s_-]?hub)?|pydantic"
    r"|sympy|networkx|tensorflow|\bsafetensors\b|\bfsspec\b|\bstdlib\b"
)
_SHORT_FORMS = r"\b(?:np|pd|tf|nx|pa|hf)(?=[._])|(?<![A-Za-z])hf\b|(?<![A-Za-z])arrow"
_NAME = re.compile(f"{_NAMES}|{_SHORT_FORMS}", re.IGNORECASE)
_CAMEL_CASE_NAME = re.compile(r"Hf(?=[A-Z])|HF(?=[A-Z]?[a-z])|(?<=[a-z])Arrow|NetworkX")

Row = dict[str, str]


def source_files(root: Path, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Sorted files under a folder, without test suites and vendored copies of other libraries."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        found.extend(Path(folder, name) for name in sorted(names) if name.endswith(suffixes))
    return found


def library_root(library: str) -> Path | None:
    """The folder of a library's sources, found without importing it."""
    if library == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = find_spec(library)
    except ValueError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def mask_names(text: str) -> str:
    """The text with library names and their usual short forms replaced."""
    return _NAME.sub(PLACEHOLDER, _CAMEL_CASE_NAME.sub(PLACEHOLDER, text))


def rows(per_label: int, seed: int = 0) -> list[Row]:
    """Balanced rows of text and label, shuffled."""
    return _collect((per_label,), seed)[0]


def split(per_label_train: int, per_label_valid: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Balanced train and validation rows which share no source file."""
    train, valid = _collect((per_label_train, per_label_valid), seed)
    return train, valid


def _collect(sizes: tuple[int, ...], seed: int) -> list[list[Row]]:
    sides: list[list[Row]] = [[] for _ in sizes]
    seen: set[str] = set()
    usable = []
    for library in LIBRARIES:
        texts = _library_texts(library, sizes, seed, seen)
        if texts is None:
            continue
        usable.append(library)
        for side, chosen in zip(sides, texts, strict=True):
            side.extend({"text": text, "label": library} for text in chosen)
    if len(usable) < MIN_LIBRARIES:
        raise RuntimeError(
            f"only {len(usable)} installed libraries ({', '.join(usable) or 'none'}) have {sum(sizes)} usable "
            f"docstrings each; at least {MIN_LIBRARIES} are needed. Ask for fewer rows per label."
        )
    for side in sides:
        random.Random(seed).shuffle(side)
    return sides


def _library_texts(library: str, sizes: tuple[int, ...], seed: int, seen: set[str]) -> list[list[str]] | None:
    """Texts for each side, or None where the library is missing or has too few."""
    root = library_root(library)
    files = [] if root is None else source_files(root)
    if not files:
        return None
    random.Random(f"{seed}-{library}").shuffle(files)
    per_file = max(3, math.ceil(3 * sum(sizes) / len(files)))
    sides: list[list[str]] = [[] for _ in sizes]
    for path in files:
        filled = [len(side) / size if size else 1.0 for side, size in zip(sides, sizes, strict=True)]
        if min(filled) >= 1:
            break
        target = filled.index(min(filled))
        wanted = min(per_file, sizes[target] - len(sides[target]))
        sides[target].extend(_file_texts(path, wanted, seed, seen))
    complete = all(len(side) >= size for side, size in zip(sides, sizes, strict=True))
    return sides if complete else None


def _file_texts(path: Path, wanted: int, seed: int, seen: set[str]) -> list[str]:
    """At most `wanted` texts of one file whose beginnings were not seen before."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return []
    candidates = list(_usable_texts(path))
    random.Random(f"{seed}-{path.name}").shuffle(candidates)
    chosen: list[str] = []
    for text in candidates:
        key = re.sub(r"\W+", " ", text).strip().lower()[:DUPLICATE_PREFIX]
        if len(chosen) < wanted and key not in seen:
            seen.add(key)
            chosen.append(text)
    return chosen


def _usable_texts(path: Path) -> Iterator[str]:
    for docstring in docstrings(path):
        masked = mask_names(docstring.text).strip()
        if len(masked) > MAX_CHARACTERS:
            masked = masked[:MAX_CHARACTERS].rsplit(None, 1)[0]
        if len(masked) >= MIN_CHARACTERS:
            yield masked
