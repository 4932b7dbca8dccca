"""Docstrings of what is installed: text that every machine with Python has, for demos that must need no network.

Sources are parsed, never imported. Which side of a split a docstring is on follows from a hash of its first
paragraph alone: equal summaries stay together, and a model that was pretrained without the held-out side never saw
one of them.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

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
"""What fasttune and its dependencies bring; the standard library stands beside them."""

_HELD_OUT = 10  # one first paragraph in so many
_MOST_BYTES = 200_000  # of a source file
_PER_FILE = 4  # rows, so that no file speaks for a package
_BEGINNING = 80  # characters of a body; equal ones appear once
_WORDS = range(4, 21)
_SENTENCE = re.compile(r"[A-Za-z`*'\"](?!.*(---|===|>>>)).*[^:]")
_LEFT_OUT = re.compile(r"_*(tests?|testing|vendor(ed)?|_?vendored_packages|third_party|externals|.*-packages)")
_BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # what stands in a list that has statements
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Row = dict[str, Any]


@dataclass(frozen=True)
class Docstring:
    """text: indentation removed. signature: `def name(arguments) -> type` as one line, of a function; else ""."""

    text: str
    signature: str

    @cached_property
    def summary(self) -> str:
        """The first paragraph as one line."""
        return " ".join(self.text.partition("\n\n")[0].split())

    @cached_property
    def body(self) -> str:
        """What stands behind the first paragraph."""
        return self.text.partition("\n\n")[2].strip()

    @property
    def is_summed_up(self) -> bool:
        """Whether the first paragraph is a sentence of 4 to 20 words."""
        return len(self.summary.split()) in _WORDS and bool(_SENTENCE.fullmatch(self.summary))

    @property
    def is_held_out(self) -> bool:
        return is_held_out(self.summary)


def is_held_out(summary: str) -> bool:
    """Whether a first paragraph belongs to the side that nothing is trained on; letters' case and blanks don't
    matter."""
    digest = hashlib.blake2b(" ".join(summary.lower().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT == 0


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


def docstrings(path: Path) -> Iterator[Docstring]:
    """The docstrings of a file; none of a file that can't be read or is no Python 3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and (text := ast.get_docstring(node)):
            yield Docstring(text, _signature(node) if isinstance(node, _FUNCTIONS) else "")


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The tree and its statements, outer ones first: `ast.walk` without expressions, which takes longer."""
    queue: deque[ast.AST] = deque([tree])
    while queue:
        node = queue.popleft()
        yield node
        for name in node._fields:
            value = getattr(node, name)
            if isinstance(value, list) and value and isinstance(value[0], _BLOCKS):
                queue.extend(value)


def split(
    rows_of: Callable[[list[Docstring]], Iterable[Row]], train: int, valid: int, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """So many rows to train on and so many held out, of all packages in turn, at most four of a file.

    rows_of: rows of some docstrings of one file, all of them on one side; equal summaries or beginnings of bodies
    appear in one call alone. Raises RuntimeError if there are not enough.
    """
    chance = random.Random(seed)
    sides: tuple[list[Row], list[Row]] = ([], [])
    wanted, seen = (train, valid), set[str]()
    sources = [
        _rows(root, rows_of, random.Random(f"{seed} {name}"), seen) for name, root in sorted(roots().items())
    ]
    while sources and any(len(side) < most for side, most in zip(sides, wanted, strict=True)):
        for source in list(sources):
            found = next(source, None)
            if found is None:
                sources.remove(source)
                continue
            place, row = found
            if len(sides[place]) < wanted[place]:
                sides[place].append(row)
    for side, most in zip(sides, wanted, strict=True):
        if len(side) < most:
            raise RuntimeError(f"{most} docstrings are needed; the installed packages have {len(side)}")
        chance.shuffle(side)
    return sides


def _rows(
    root: Path, rows_of: Callable[[list[Docstring]], Iterable[Row]], chance: random.Random, seen: set[str]
) -> Iterator[tuple[int, Row]]:
    """(0 to train on or 1 held out, row)"""
    paths = files(root)
    chance.shuffle(paths)
    for path in paths:
        sides: tuple[list[Docstring], list[Docstring]] = ([], [])
        for docstring in docstrings(path):
            keys = {docstring.summary.lower(), docstring.body[:_BEGINNING].lower()} - {""}
            if not keys & seen:
                seen |= keys
                sides[docstring.is_held_out].append(docstring)
        for place, side in enumerate(sides):
            yield from ((place, row) for row in islice(rows_of(side), _PER_FILE))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"
