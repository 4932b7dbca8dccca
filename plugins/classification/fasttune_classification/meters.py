"""Streaming metrics: what has been seen is kept as counts, merged by adding, and never holds logits.

Two results need more than counts: mAP keeps five bytes a row and class, Pearson and Spearman sixteen a row.
Every result is a defined number: where a ratio has no denominator it is 0.
"""

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np


class SingleLabel:
    """Accuracy, F1, Matthews correlation, confusion counts. A class is what some reference or prediction names."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        self.pairs[reference["label"], prediction["label"]] += 1

    def merge(self, other: "SingleLabel") -> None:
        self.pairs.update(other.pairs)

    def result(self) -> dict[str, Any]:
        """`confusion.counts[i][j]`: rows of class i that were predicted as class j."""
        classes = sorted({name for pair in self.pairs for name in pair})
        index = {name: i for i, name in enumerate(classes)}
        confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        for (truth, predicted), count in self.pairs.items():
            confusion[index[truth], index[predicted]] = count
        hits, actual, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        f1 = _ratio(2 * hits, actual + claimed)
        return {
            "accuracy": float(_ratio(hits.sum(), confusion.sum())),
            "macro_f1": _mean(f1),
            "weighted_f1": float(_ratio((f1 * actual).sum(), actual.sum())),
            "mcc": _matthews(hits, actual, claimed),
            "confusion": {"classes": classes, "counts": confusion.tolist()},
            "per_class": _per_class(classes, hits, actual, claimed),
        }


class MultiLabel:
    """Micro and macro F1 over all classes of the model; mAP over the classes that have a positive row."""

    def __init__(self) -> None:
        self.classes: tuple[str, ...] = ()
        self.hits: Counter[str] = Counter()
        self.actual: Counter[str] = Counter()
        self.claimed: Counter[str] = Counter()
        self.scores = array("f")  # [rows, classes], row by row
        self.truths = bytearray()  # the same shape, 0 or 1

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        scores = prediction["scores"]
        self.classes = self.classes or tuple(scores)
        truth, claimed = set(reference["label"]), set(prediction["labels"])
        self.hits.update(truth & claimed)
        self.actual.update(truth)
        self.claimed.update(claimed)
        self.scores.extend(scores[name] for name in self.classes)
        self.truths.extend(name in truth for name in self.classes)

    def merge(self, other: "MultiLabel") -> None:
        """Raises ValueError if the other meter has seen a model with other classes."""
        if self.classes and other.classes and self.classes != other.classes:
            raise ValueError(f"meters of different classes can't be merged: {self.classes}, {other.classes}")
        self.classes = self.classes or other.classes
        for mine, theirs in (
            (self.hits, other.hits),
            (self.actual, other.actual),
            (self.claimed, other.claimed),
        ):
            mine.update(theirs)
        self.scores.extend(other.scores)
        self.truths.extend(other.truths)

    def result(self) -> dict[str, Any]:
        classes = [*self.classes, *sorted(set(self.actual) - set(self.classes))]
        hits, actual, claimed = (
            np.array([counts[name] for name in classes], dtype=np.int64)
            for counts in (self.hits, self.actual, self.claimed)
        )
        precision = self._average_precision()
        per_class = _per_class(classes, hits, actual, claimed)
        for name, value in precision.items():
            per_class[name]["average_precision"] = value
        return {
            "micro_f1": float(_ratio(2 * hits.sum(), actual.sum() + claimed.sum())),
            "macro_f1": _mean(_ratio(2 * hits, actual + claimed)),
            "mAP": _mean(np.array(list(precision.values()))),
            "per_class": per_class,
        }

    def _average_precision(self) -> dict[str, float]:
        """By class; a class without a positive row has none."""
        shape = (-1, max(len(self.classes), 1))
        scores = np.frombuffer(self.scores, dtype=np.float32).reshape(shape) if self.scores else np.zeros((0, 1))
        truths = np.frombuffer(bytes(self.truths), dtype=np.uint8).reshape(shape)
        return {
            name: average_precision(truths[:, i], scores[:, i])
            for i, name in enumerate(self.classes)
            if truths[:, i].any()
        }


class Regression:
    """Mean squared error, Pearson and Spearman correlation."""

    def __init__(self) -> None:
        self.predicted = array("d")
        self.actual = array("d")

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        self.predicted.append(prediction["value"])
        self.actual.append(reference["label"])

    def merge(self, other: "Regression") -> None:
        self.predicted.extend(other.predicted)
        self.actual.extend(other.actual)

    def result(self) -> dict[str, float]:
        predicted, actual = np.array(self.predicted), np.array(self.actual)
        return {
            "mse": _mean((predicted - actual) ** 2),
            "pearson": _correlation(predicted, actual),
            "spearman": _correlation(_ranks(predicted), _ranks(actual)),
        }


def average_precision(truth: np.ndarray, score: np.ndarray) -> float:
    """The sum over thresholds of precision times the gain in recall. truth: 0 or 1 [n]; score: [n]."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)  # tied scores share one threshold
    hits = np.cumsum(truth[order], dtype=np.int64)[ends]
    gained = np.diff(hits, prepend=0)
    return float((hits / (ends + 1) * gained).sum() / hits[-1])


def _ratio(above: Any, below: Any) -> np.ndarray:
    """above / below, 0 where below is 0."""
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _per_class(classes: list[str], hits: Any, actual: Any, claimed: Any) -> dict[str, dict[str, float]]:
    precision, recall, f1 = _ratio(hits, claimed), _ratio(hits, actual), _ratio(2 * hits, actual + claimed)
    return {
        name: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "support": int(actual[i]),
        }
        for i, name in enumerate(classes)
    }


def _matthews(hits: np.ndarray, actual: np.ndarray, claimed: np.ndarray) -> float:
    """The correlation of two partitions (Gorodkin 2004); Python's integers, as the products pass 2**63."""
    rows, right = int(actual.sum()), int(hits.sum())
    a, c = [int(x) for x in actual], [int(x) for x in claimed]
    covariance = right * rows - sum(x * y for x, y in zip(a, c, strict=True))
    spread = (rows**2 - sum(x * x for x in c)) * (rows**2 - sum(x * x for x in a))
    return covariance / spread**0.5 if spread else 0.0


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; 0 if either side is constant to rounding."""
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    spread = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / spread, -1, 1)) if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]
