"""Questions about the parameters that a docstring describes: their types and their defaults."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fasttune.docstrings import Docstring

_MOST = 700  # characters of a context
_BEFORE = 120  # of them before the first parameter
_LEAST_ENTRIES = 3  # or there is little to find
_TYPE_WORDS = 4
# "name (type, optional):" as Google and transformers write it, "name : type, optional" as numpy does.
_ENTRY = re.compile(r"^[ \t]+\*{0,2}(\w+) \(([^\n]{2,80})\):|^\*{0,2}(\w+) : ([^\n]{2,80})$", re.MULTILINE)
_TYPE = re.compile(r"(?::\w+:)?[`~]*([A-Za-z][^,;:`{}()]*[\w\]])")
_DEFAULT = re.compile(r"\bdefault(?:s to|:| is|=|)[ =]*[`'\"]*([^\s`'\",;()]+)", re.IGNORECASE)

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A parameter; places are characters of the text. default: None where none is told."""

    name: str
    type: tuple[int, int]
    default: tuple[int, int] | None


def questions(docstrings: list[Docstring]) -> Iterator[Row]:
    """A row {"question", "context", "answers", "answer_start"} of each that describes three parameters or more."""
    for docstring in docstrings:
        found = entries(docstring.text)
        if len(found) < _LEAST_ENTRIES:
            continue
        begin = max(0, found[0].type[0] - _BEFORE)
        context = docstring.text[begin : begin + _MOST]
        asked = [("type", entry.name, entry.type) for entry in found]
        defaults = [("default", entry.name, entry.default) for entry in found if entry.default]
        chance = random.Random(context)
        if defaults and chance.random() < 0.5:
            asked = defaults
        inside = [one for one in asked if one[2][1] <= begin + len(context)]
        if inside:
            what, name, (start, end) = chance.choice(inside)
            yield {
                "question": f"What is the {what} of {name}?",
                "context": context,
                "answers": docstring.text[start:end],
                "answer_start": start - begin,
            }


def entries(text: str) -> list[Entry]:
    """The described parameters whose type is told, in order."""
    found = []
    for match in _ENTRY.finditer(text):
        group = 1 if match[1] else 3
        kind = _TYPE.match(text, match.start(group + 1), match.end(group + 1))
        if kind is None or len(kind[1].split()) > _TYPE_WORDS or kind[1].count("[") != kind[1].count("]"):
            continue
        if kind[1].lower() == "optional":
            continue
        default = _DEFAULT.search(text, kind.end(), match.end(group + 1))
        found.append(Entry(match[group], kind.span(1), default.span(1) if default else None))
    return found


def first_type(context: str) -> str:
    """What a reader without a model might answer: the first type that is told."""
    found = entries(context)
    return context[slice(*found[0].type)] if found else ""
