"""Conversations about functions: the user writes a signature, the assistant a line that says what it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fasttune.docstrings import Docstring

_MOST = 160  # characters of a signature
_TURNS = 3  # of the user, in a conversation


def conversations(docstrings: list[Docstring]) -> Iterator[dict[str, Any]]:
    """{"messages"}, of up to three functions of one file."""
    told = [d for d in docstrings if 0 < len(d.signature) <= _MOST and d.is_summed_up]
    for start in range(0, len(told), _TURNS):
        messages = []
        for docstring in told[start : start + _TURNS]:
            messages.append({"role": "user", "content": docstring.signature})
            messages.append({"role": "assistant", "content": docstring.summary})
        yield {"messages": messages}
