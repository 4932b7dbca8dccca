"""Docstrings of what is installed, as pairs: the body, and the line that sums it up.

Sources are parsed, never imported. Whether a pair is to train on or held out follows from a hash of its summary
alone, so that equal summaries stay on one side, and the embedded model never saw those of the other.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "datasets",
    "fsspec",
    "huggingface_hub",
    "networkx",
    "numpy",
    "pandas",
    "pydantic",
    "sympy",
    "torch",
    "transformers",
)
"""What fasttune and its dependencies bring, and the standard library beside them."""

_HELD_OUT = 10  # one summary in so many
_WORDS = range(4, 21)  # of a summary
_LEAST_BODY, _MOST_BODY = 100, 800  # characters
_MOST_BYTES = 200_000  # of a source file
_PER_FILE = 4  # rows, so that no file speaks for a package
_SENTENCE = re.compile(r"[A-Za-z`*'\"](?!.*(---|===|>>>)).*[^:]")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LEFT_OUT = re.compile(r"_*(tests?|testing|vendor(ed)?|_?vendored_packages|third_party|externals|.*-packages)")

Row = dict[str, str]


def roots(everything: bool = False) -> dict[str, Path]:
    """Folders of sources by package; everything: all that is installed, not only PACKAGES."""
    site = Path(sysconfig.get_path("purelib"))
    names = sorted(path.name for path in site.iterdir() if path.is_dir()) if everything else PACKAGES
    found = {name: site / name for name in names if (site / name).is_dir() and "." not in name}
    return {**found, "python": Path(sysconfig.get_path("stdlib"))}


def files(root: Path) -> list[Path]:
    """Python sources below a folder, sorted, without tests and foreign packages."""
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not _LEFT_OUT.fullmatch(name) and name != "__pycache__")
        found += (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
    return [path for path in found if path.stat().st_size <= _MOST_BYTES]


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file, indentation removed; none of a file that is no Python 3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def pair(docstring: str) -> Row | None:
    """{"document", "summary"}: the text behind the first paragraph, and that paragraph as one line; None if one of
    them is too short or too long to be what its name says."""
    head, _, body = docstring.partition("\n\n")
    summary, body = " ".join(head.split()), body.strip()
    if len(summary.split()) not in _WORDS or len(body) < _LEAST_BODY or not _SENTENCE.fullmatch(summary):
        return None
    if len(body) > _MOST_BODY:
        body = body[:_MOST_BODY].rpartition(" ")[0]
    return {"document": body, "summary": summary}


def is_held_out(summary: str) -> bool:
    """Whether a first paragraph belongs to the valid side; letters' case and blanks don't matter."""
    digest = hashlib.blake2b(" ".join(summary.lower().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT == 0


def split(train: int, valid: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """So many rows to train on and so many held out, of all packages in turn; equal summaries or beginnings of
    bodies appear once. Raises RuntimeError if there are not enough."""
    chance = random.Random(seed)
    sides: tuple[list[Row], list[Row]] = ([], [])
    wanted, seen = (train, valid), set[str]()
    sources = [_rows(root, random.Random(f"{seed} {name}")) for name, root in sorted(roots().items())]
    while sources and any(len(side) < most for side, most in zip(sides, wanted, strict=True)):
        for source in list(sources):
            row = next(source, None)
            if row is None:
                sources.remove(source)
                continue
            keys = {row["summary"].lower(), row["document"][:80].lower()}
            place = int(is_held_out(row["summary"]))
            if not keys & seen and len(sides[place]) < wanted[place]:
                seen |= keys
                sides[place].append(row)
    for side, most in zip(sides, wanted, strict=True):
        if len(side) < most:
            raise RuntimeError(f"{most} docstrings are needed; the installed packages have {len(side)}")
        chance.shuffle(side)
    return sides


def _rows(root: Path, chance: random.Random) -> Iterator[Row]:
    paths = files(root)
    chance.shuffle(paths)
    for path in paths:
        yield from [row for text in docstrings(path) if (row := pair(text))][:_PER_FILE]


def first_sentence(document: str) -> str:
    """What a reader without a model would take for the summary."""
    return re.split(r"(?<=[.!?])\s|\n", document.strip(), maxsplit=1)[0].strip()
