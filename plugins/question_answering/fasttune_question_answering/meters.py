"""Exact match and F1, in per cent, as the official evaluation scripts of SQuAD 1.1 and 2.0 count them."""

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fasttune_question_answering.answers import gold

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_NAMES = ("exact_match", "f1")
_PUNCTUATION = frozenset(string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous white space."""
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(prediction: str, answer: str) -> float:
    return float(normalized(prediction) == normalized(answer))


def f1(prediction: str, answer: str, *, empty_may_match: bool) -> float:
    """F1 of the words. empty_may_match: two answers without words are equal (2.0's script) or share nothing
    (1.1's)."""
    found, wanted = normalized(prediction).split(), normalized(answer).split()
    if empty_may_match and not (found and wanted):
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


class AnswerMeter:
    """Three sums a kind of question. Without an unanswerable question the result is SQuAD 1.1's; with one it is
    2.0's, with a split by whether there is an answer."""

    def __init__(self) -> None:
        self.first = [0.0, 0.0, 0.0]  # questions, exact, f1 by the script of 1.1
        self.second = {"HasAns": [0.0, 0.0, 0.0], "NoAns": [0.0, 0.0, 0.0]}

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        text, texts = prediction["answer"], [answer.text for answer in gold(reference)]
        if texts:
            _add(self.first, text, texts, empty_may_match=False)
        # 2.0 drops answers without words, and what is left without any is to be answered by "".
        worded = [answer for answer in texts if normalized(answer)] or [""]
        _add(self.second["HasAns" if texts else "NoAns"], text, worded, empty_may_match=True)

    def merge(self, other: "AnswerMeter") -> None:
        for ours, theirs in ((self.first, other.first), *((self.second[k], other.second[k]) for k in self.second)):
            ours[:] = [a + b for a, b in zip(ours, theirs, strict=True)]

    def result(self) -> dict[str, Any]:
        if not self.second["NoAns"][0]:
            return _shares(self.first, _NAMES)
        both = [a + b for a, b in zip(*self.second.values(), strict=True)]
        result = _shares(both, _NAMES)
        for name, sums in self.second.items():
            if sums[0]:
                result |= _shares(sums, (f"{name}_exact", f"{name}_f1")) | {f"{name}_total": int(sums[0])}
        return result


def _add(sums: list[float], prediction: str, answers: list[str], *, empty_may_match: bool) -> None:
    sums[0] += 1
    sums[1] += max(exact(prediction, answer) for answer in answers)
    sums[2] += max(f1(prediction, answer, empty_may_match=empty_may_match) for answer in answers)


def _shares(sums: list[float], names: tuple[str, str]) -> dict[str, Any]:
    count = sums[0] or 1.0
    return {name: 100 * value / count for name, value in zip(names, sums[1:], strict=True)}
