"""ROUGE-1, 2, L and Lsum (Lin 2004), F1: the arithmetic of the rouge-score package with its default tokenizer.

Text is lower-cased; every run of characters outside a-z and 0-9 ends a word. Words are not stemmed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_WORD = re.compile(r"[a-z0-9]+")


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """F1 by name, each in [0, 1]; 0 where one of the texts has no word. A line is a sentence to ROUGE-Lsum."""
    found, wanted = words(prediction), words(reference)
    lines = [[words(line) for line in text.split("\n")] for text in (prediction, reference)]
    return {
        "rouge1": _overlap(Counter(found), Counter(wanted)),
        "rouge2": _overlap(Counter(pairwise(found)), Counter(pairwise(wanted))),
        "rougeL": _f1(len(common(wanted, found)), len(found), len(wanted)),
        "rougeLsum": _union_over_lines(*lines),
    }


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _f1(hits: int, found: int, wanted: int) -> float:
    """Of precision hits / found and recall hits / wanted."""
    return 2 * hits / (found + wanted) if hits else 0.0


def _overlap(found: Counter[Any], wanted: Counter[Any]) -> float:
    return _f1((found & wanted).total(), found.total(), wanted.total())


def common(reference: Sequence[str], candidate: Sequence[str]) -> list[int]:
    """Places in the reference of a longest common subsequence.

    Row i of the usual table of lengths is kept as bits (Hyyrö 2004): bit j is 0 where the length grows between
    columns j and j + 1. Of several longest ones it is the one that rouge-score's backtracking finds, since
    ROUGE-Lsum joins them over lines.
    """
    full = (1 << len(candidate)) - 1
    where: dict[str, int] = {}
    for column, word in enumerate(candidate):
        where[word] = where.get(word, 0) | 1 << column
    rows = [full]
    for word in reference:
        matches = rows[-1] & where.get(word, 0)
        rows.append((rows[-1] + matches | rows[-1] - matches) & full)

    def length(i: int, j: int) -> int:
        return j - (rows[i] & (1 << j) - 1).bit_count()

    places, i, j = [], len(reference), len(candidate)
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif length(i, j - 1) > length(i - 1, j):
            j -= 1
        else:
            i -= 1
    return places[::-1]


def _union_over_lines(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """For each line of the reference, the words that are common with any line of the prediction; no word of either
    text counts twice."""
    left = Counter(word for line in found for word in line) & Counter(word for line in wanted for word in line)
    hits = 0
    for line in wanted:
        for place in sorted(set().union(*(common(line, other) for other in found))):
            if left[line[place]]:
                left[line[place]] -= 1
                hits += 1
    return _f1(hits, sum(map(len, found)), sum(map(len, wanted)))


class RougeMeter:
    """Means of ROUGE over rows, and how long the texts are, in words between blanks.

    role: the key of the text in predictions and references.
    """

    def __init__(self, role: str):
        self.role = role
        self.rows = 0
        self.sums = dict.fromkeys(NAMES, 0.0)
        self.predicted_words = 0
        self.reference_words = 0

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        found, wanted = prediction[self.role], reference[self.role]
        for name, value in rouge(found, wanted).items():
            self.sums[name] += value
        self.predicted_words += len(found.split())
        self.reference_words += len(wanted.split())
        self.rows += 1

    def merge(self, other: RougeMeter) -> None:
        for name in NAMES:
            self.sums[name] += other.sums[name]
        self.predicted_words += other.predicted_words
        self.reference_words += other.reference_words
        self.rows += other.rows

    def result(self) -> dict[str, Any]:
        """length_ratio: predicted words to a word of the references."""
        rows = max(1, self.rows)
        return {
            **{name: total / rows for name, total in self.sums.items()},
            "predicted_words": self.predicted_words / rows,
            "reference_words": self.reference_words / rows,
            "length_ratio": self.predicted_words / max(1, self.reference_words),
        }
