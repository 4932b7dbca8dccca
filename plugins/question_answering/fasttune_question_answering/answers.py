"""The right answers of a row, in whatever way they are written, and whether they are where they say."""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fasttune.errors import DataError

_SHOWN = 60  # characters of a text in a message
_FLAGS = {"true": True, "1": True, "false": False, "0": False, "": None}


@dataclass(frozen=True)
class Answer:
    """text == context[start : start + len(text)]."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def gold(row: Mapping[str, Any]) -> list[Answer]:
    """The right answers of a row by role, in their order; none if its question has no answer.

    Raises DataError(column, why) if they can't be read, are not at their offsets, or contradict `is_impossible`.
    """
    try:
        texts, starts = _read(row.get("answers"), row.get("answer_start"))
        impossible = _flag(row.get("is_impossible"))
        if impossible and texts:
            raise DataError("is_impossible", f"is true, but there is an answer: {_shown(texts[0])}")
        if impossible is False and not texts:
            raise DataError("answers", "there is no answer, but is_impossible is false")
        return [_located(text, start, row["context"]) for text, start in zip(texts, starts, strict=True)]
    except DataError as error:
        raise DataError(error.column, error.why + named(row)) from None


def named(row: Mapping[str, Any]) -> str:
    """The question's id as the end of a message, where the row has one."""
    return "" if row.get("id") in (None, "") else f" (question id {row['id']!r})"


def _read(answers: Any, starts: Any) -> tuple[list[str], list[int | None]]:
    """Texts and offsets; an offset is None where the row gives none."""
    answers = _parsed(answers)
    if isinstance(answers, str):
        found = _paired([answers], starts) if answers.strip() else []
    elif answers is None:
        found = []
    elif isinstance(answers, Mapping):
        found = _columns(answers, starts)
    elif isinstance(answers, (list, tuple)):
        found = _items(list(answers), starts)
    else:
        raise DataError("answers", f"expected answers, found {type(answers).__name__} {_shown(answers)}")
    texts = [_text(text) for text, _ in found]
    return texts, [_offset(start) for _, start in found]


def _parsed(value: Any) -> Any:
    """Text that holds an object or a list, as tables of plain text do: JSON, or as Python writes it."""
    value = _plain(value)
    if not isinstance(value, str) or not value.strip().startswith(("{", "[")):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        items = [parsed] if isinstance(parsed, dict) else parsed
        if all(isinstance(item, dict) and "text" in item for item in items):
            return parsed
    return value  # an answer may well begin with a bracket


def _columns(answers: Mapping[str, Any], starts: Any) -> list[tuple[Any, Any]]:
    if "text" not in answers:
        raise DataError(
            "answers", f"expected the keys text and answer_start, found {', '.join(map(str, answers))}"
        )
    texts, starts = _plain(answers["text"]), answers.get("answer_start", starts)
    if isinstance(texts, str):
        texts = [texts]
    return _paired([] if texts is None else texts, starts)


def _items(answers: list[Any], starts: Any) -> list[tuple[Any, Any]]:
    if not all(isinstance(answer, Mapping) for answer in answers):
        return _paired(answers, starts)
    lacking = next((answer for answer in answers if "text" not in answer), None)
    if lacking is not None:
        raise DataError("answers", f"expected a key text in every answer, found {', '.join(map(str, lacking))}")
    return [(answer["text"], answer.get("answer_start")) for answer in answers]


def _paired(texts: list[Any], starts: Any) -> list[tuple[Any, Any]]:
    starts = _list(starts)
    if starts is None:
        starts = [None] * len(texts)
    if len(texts) != len(starts):
        raise DataError(
            "answers", f"expected an offset a text, found {len(texts)} texts and {len(starts)} answer_start"
        )
    return list(zip(texts, starts, strict=True))


def _list(value: Any) -> list[Any] | None:
    """Offsets that may stand alone, or as JSON in a table of text; None if there are none."""
    value = _plain(value)
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]  # `_offset` names the fault
    if value is None or value == "":
        return None
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError("answers", f"expected text, found {type(value).__name__} {_shown(value)}")
    if not value.strip():
        raise DataError("answers", "an answer is blank; a question without answer has an empty list of them")
    return value


def _offset(value: Any) -> int | None:
    """A number of characters; tables of text hold it as such, pandas as a float."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or number < 0 or not number.is_integer():
        why = f"answer_start: expected the place of the answer's first character, from 0, found {_shown(value)}"
        raise DataError("answers", why)
    return int(number)


def _flag(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    name = str(value).strip().lower()
    if name not in _FLAGS:
        raise DataError("is_impossible", f"expected true or false, found {_shown(value)}")
    return _FLAGS[name]


def _plain(value: Any) -> Any:
    """Lists where NumPy's arrays are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _located(text: str, start: int | None, context: str) -> Answer:
    first = context.find(text)
    if start is None:
        if first < 0:
            raise DataError("answers", f"{_shown(text)} does not occur in the context")
        if context.find(text, first + 1) >= 0:
            raise DataError(
                "answers",
                f"{_shown(text)} occurs more than once in the context; answer_start must say which is meant",
            )
        return Answer(text, first)
    found = context[start : start + len(text)]
    if found != text:
        near = context.find(text, max(0, start - len(text) - _SHOWN))
        near = first if near < 0 else near
        where = f"it is at {near}" if near >= 0 else "it is nowhere in the context"
        what = f"found {_shown(found)}" if found else f"the context ends at {len(context)}"
        raise DataError("answers", f"expected {_shown(text)} at answer_start {start}, {what}; {where}")
    return Answer(text, start)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
