"""Pairs of a docstring's body and the line that sums it up."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fasttune.docstrings import Docstring

_LEAST, _MOST = 100, 800  # characters of a body

Row = dict[str, str]


def pairs(docstrings: list[Docstring]) -> Iterator[Row]:
    """{"document", "summary"} of those that are summed up in a line and have a body; too long a one is cut."""
    for docstring in docstrings:
        body = docstring.body
        if docstring.is_summed_up and len(body) >= _LEAST:
            kept = body if len(body) <= _MOST else body[:_MOST].rpartition(" ")[0]
            yield {"document": kept, "summary": docstring.summary}


def first_sentence(document: str) -> str:
    """What a reader without a model would take for the summary."""
    return re.split(r"(?<=[.!?])\s|\n", document.strip(), maxsplit=1)[0].strip()
