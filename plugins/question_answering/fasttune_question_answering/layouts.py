"""Documents of nested JSON to rows: SQuAD 1.1 and 2.0, and flat rows under "data"."""

from collections.abc import Iterator
from typing import Any

from fasttune.errors import DataError


def rows_of(document: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A row a question, in the order of the file; None unless the document has a list "data".

    SQuAD: {"data": [{"paragraphs": [{"context", "qas": [{"question", "id", "answers", "is_impossible"}]}]}]}.
    Flat: {"data": [row, …]}. Raises DataError(None, why) with the place of what is missing.
    """
    entries = document.get("data")
    if not isinstance(entries, list):
        return None
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(None, f"data[{number}]: expected an object, found {type(entry).__name__}")
        rows.extend(_questions(entry, f"data[{number}]") if "paragraphs" in entry else [entry])
    return rows


def _questions(article: dict[str, Any], at: str) -> Iterator[dict[str, Any]]:
    for i, paragraph in enumerate(_objects(article, "paragraphs", at)):
        place = f"{at}.paragraphs[{i}]"
        if "context" not in paragraph:
            raise DataError(None, f"{place}: has no 'context'; found {_keys(paragraph)}")
        for question in _objects(paragraph, "qas", place):
            answers = question.get("answers")
            row = {
                "id": question.get("id"),
                "question": question.get("question"),
                "context": paragraph["context"],
                "answers": [] if answers is None else answers,
            }
            yield row | ({"is_impossible": question["is_impossible"]} if "is_impossible" in question else {})


def _objects(parent: dict[str, Any], key: str, at: str) -> list[dict[str, Any]]:
    found = parent.get(key)
    if not isinstance(found, list):
        raise DataError(None, f"{at}: expected a list {key!r}; found {_keys(parent)}")
    for number, item in enumerate(found):
        if not isinstance(item, dict):
            raise DataError(None, f"{at}.{key}[{number}]: expected an object, found {type(item).__name__}")
    return found


def _keys(entry: dict[str, Any]) -> str:
    return ", ".join(map(repr, entry)) or "an empty object"
