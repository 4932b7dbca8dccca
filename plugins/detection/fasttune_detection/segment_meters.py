"""The streaming metrics of segments: mIoU of classes, mask mAP of objects, panoptic quality.

All of them count in pixels of the original image, know classes by their names, and keep numbers alone, but for the
masks of objects, kept as their compressed runs: which of two is ranked first, only the end tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Any

import numpy as np

from fasttune_detection.coco_scores import CocoScores, Regions, mean
from fasttune_detection.segments import Reading, Segments, from_rle, read_segments, to_rle

_MATCH = 0.5  # IoU above which segments match; at most one pair of disjoint segments can


def meter_of(reading: Reading) -> SemanticMeter | InstanceMeter | PanopticMeter:
    """The meter of the kind that is read."""
    match reading.kind:
        case "semantic":
            return SemanticMeter(reading)
        case "instance":
            return InstanceMeter(reading)
        case "panoptic":
            return PanopticMeter(reading)


class SemanticMeter:
    """mIoU, pixel accuracy and both by class, of disjoint segments, one a class.

    counts[(true, predicted)]: pixels; predicted is None where no segment is. Void counts nowhere.
    """

    def __init__(self, reading: Reading):
        self.reading = reading
        self.counts: Counter[tuple[str, str | None]] = Counter()

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """prediction: {"size": [width, height], "segments": [{"label", "mask": RLE}, …]}. reference: the row by
        role, its mask opened; what it holds is read by `read_segments`, whose DataError it raises.

        Raises ValueError for predicted segments of another size, or that overlap.
        """
        truth, labels, shared = _compared(prediction, reference, self.reading)
        for (i, j), pixels in shared.items():
            if i >= 0:
                self.counts[truth.labels[i], labels[j] if j >= 0 else None] += pixels

    def merge(self, other: SemanticMeter) -> None:
        self.counts.update(other.counts)

    def result(self) -> dict[str, Any]:
        """mIoU over the classes that are true or predicted somewhere, mean_accuracy over those that are true;
        "per_class" of all of them; None where nothing was counted."""
        true: Counter[str] = Counter()
        claimed: Counter[str] = Counter()
        for (name, found), pixels in self.counts.items():
            true[name] += pixels
            if found is not None:
                claimed[found] += pixels
        hits = {name: self.counts[name, name] for name in sorted({*true, *claimed})}
        per_class = {
            name: {
                "IoU": _ratio(hit, true[name] + claimed[name] - hit),
                "accuracy": _ratio(hit, true[name]),
                "pixels": true[name],
            }
            for name, hit in hits.items()
        }
        return {
            "mIoU": mean([held["IoU"] for held in per_class.values()]),
            "pixel_accuracy": _ratio(sum(hits.values()), true.total()),
            "mean_accuracy": mean([held["accuracy"] for held in per_class.values()]),
            "per_class": per_class,
        }


class InstanceMeter:
    """mAP and mAR of masks, as `CocoScores` counts them, and the mAP of the boxes around the masks.

    Sizes are areas in pixels of the original image: what the row states under "area", else the mask's.
    """

    def __init__(self, reading: Reading):
        self.reading, self.scores = reading, CocoScores()

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """prediction: {"size": [width, height], "segments": [{"label", "score", "mask": RLE}, …]}. reference: as
        `SemanticMeter.update` takes it.

        Raises ValueError for predicted segments of another size, or with scores that are not finite.
        """
        truth = read_segments(reference, _size(prediction), self.reading)
        stated = tuple(to_rle(mask) for mask in truth.masks)
        truths = Regions(truth.labels, _around(stated), truth.areas, truth.crowd.astype(np.float64), stated)
        segments = prediction["segments"]
        scores = np.array([segment["score"] for segment in segments], dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("a prediction has scores that are not finite")
        masks = _masks(prediction)
        labels = tuple(segment["label"] for segment in segments)
        found = Regions(labels, _around(masks), _areas(masks), scores, masks)
        self.scores.add(reference.get("image"), truths, found)

    def merge(self, other: InstanceMeter) -> None:
        self.scores.merge(other.scores)

    def result(self) -> dict[str, Any]:
        return {**self.scores.result("segm"), "box_mAP": self.scores.result("bbox")["mAP"]}


@dataclass
class _Matches:
    """Of one class. ious: of its matched segments. missed: true segments without a match. wrong: predicted ones.
    thing: whether a true segment was one; None: there was no true segment."""

    ious: list[float] = field(default_factory=list)
    missed: int = 0
    wrong: int = 0
    thing: bool | None = None

    def result(self) -> dict[str, float | None]:
        """Sums are exact, and so the same in any order."""
        found, half = len(self.ious), (self.missed + self.wrong) / 2
        if not found + half:
            return dict.fromkeys(("PQ", "SQ", "RQ"))
        total = fsum(self.ious)
        return {"PQ": total / (found + half), "SQ": total / found if found else 0.0, "RQ": found / (found + half)}


class PanopticMeter:
    """Panoptic quality (Kirillov et al. 2019, arXiv 1801.00868, section 4).

    Segments of one class match if their IoU, without pixels that are void in truth, is above 0.5. A predicted
    segment without a match that lies by more than half in void, or in crowds of its class, is no error; a crowd is
    nothing to find. (Section 4.1's rules on void and groups, as COCO's panopticapi counts them.)
    """

    def __init__(self, reading: Reading):
        self.reading = reading
        self.classes: dict[str, _Matches] = {}

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """As `SemanticMeter.update`; a class may have several segments."""
        truth, labels, shared = _compared(prediction, reference, self.reading)
        true, claimed = Counter[int](), Counter[int]()  # pixels of each segment
        void, crowd = (
            Counter[int](),
            Counter[int](),
        )  # of each predicted segment, in void and in crowds of its class
        for (i, j), pixels in shared.items():
            true[i] += pixels
            claimed[j] += pixels
            if i < 0:
                void[j] += pixels
            elif truth.crowd[i] and j >= 0 and truth.labels[i] == labels[j]:
                crowd[j] += pixels
        found: dict[int, int] = {}  # true segments by the predicted ones that match
        for (i, j), pixels in shared.items():
            if i < 0 or j < 0 or truth.crowd[i] or truth.labels[i] != labels[j]:
                continue
            iou = pixels / (true[i] + claimed[j] - pixels - void[j])
            if iou > _MATCH:
                found[j] = i
                self._of(labels[j]).ious.append(iou)
        for i, name in enumerate(truth.labels):
            matches = self._of(name)
            matches.thing = bool(matches.thing or truth.thing[i])
            matches.missed += not truth.crowd[i] and i not in found.values()
        for j, name in enumerate(labels):
            if j in claimed and j not in found and void[j] + crowd[j] <= _MATCH * claimed[j]:
                self._of(name).wrong += 1

    def _of(self, name: str) -> _Matches:
        return self.classes.setdefault(name, _Matches())

    def merge(self, other: PanopticMeter) -> None:
        for name, more in other.classes.items():
            held = self._of(name)
            held.ious += more.ious
            held.missed += more.missed
            held.wrong += more.wrong
            held.thing = more.thing if held.thing is None else bool(held.thing or more.thing)

    def result(self) -> dict[str, Any]:
        """PQ, SQ and RQ as means over classes, PQ of things and of stuff, and "per_class"; None where nothing was
        true or predicted. A class that is predicted only is stuff if the options say so."""
        per_class: dict[str, dict[str, Any]] = {}
        for name in sorted(self.classes):
            held = self.classes[name]
            thing = name not in (self.reading.stuff or ()) if held.thing is None else held.thing
            segments = len(held.ious) + held.missed
            per_class[name] = {**held.result(), "segments": segments, "thing": thing}
        return {
            **{metric: mean([held[metric] for held in per_class.values()]) for metric in ("PQ", "SQ", "RQ")},
            "PQ_things": mean([held["PQ"] for held in per_class.values() if held["thing"]]),
            "PQ_stuff": mean([held["PQ"] for held in per_class.values() if not held["thing"]]),
            "per_class": per_class,
        }


def _compared(
    prediction: Mapping[str, Any], reference: Mapping[str, Any], reading: Reading
) -> tuple[Segments, list[str], dict[tuple[int, int], int]]:
    """True segments, the classes of predicted ones, and pixels by (true, predicted) segment; -1: in none."""
    size = _size(prediction)
    truth = read_segments(reference, size, reading)
    labels = [segment["label"] for segment in prediction["segments"]]
    predicted = _numbered(map(from_rle, _masks(prediction)), size)
    return truth, labels, _pairs(_numbered(truth.masks, size), predicted)


def _size(prediction: Mapping[str, Any]) -> tuple[int, int]:
    width, height = prediction["size"]
    return int(width), int(height)


def _masks(prediction: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The masks of its segments. Raises ValueError for one that has another size than the prediction."""
    width, height = _size(prediction)
    masks = tuple(segment["mask"] for segment in prediction["segments"])
    for mask in masks:
        if list(mask["size"]) != [height, width]:
            raise ValueError(f"a prediction of {width} x {height} has a mask of {mask['size'][::-1]}")
    return masks


def _numbered(masks: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """int64 [h, w]: which of the masks, bool [h, w], a pixel is in; -1: none. Raises ValueError if in several."""
    numbers = np.full(size[::-1], -1, dtype=np.int64)
    for i, mask in enumerate(masks):
        if (numbers[mask] >= 0).any():
            raise ValueError(f"segment {i + 1} overlaps another; they must be disjoint")
        numbers[mask] = i
    return numbers


def _pairs(true: np.ndarray, predicted: np.ndarray) -> dict[tuple[int, int], int]:
    """Pixels by (true, predicted), of two maps as `_numbered` makes them."""
    columns = int(predicted.max()) + 2
    counts = np.bincount(((true + 1) * columns + predicted + 1).ravel())
    return {(at // columns - 1, at % columns - 1): int(counts[at]) for at in np.flatnonzero(counts).tolist()}


def _around(masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """float64 [n, 4], xywh: the boxes around masks; zeros around an empty one."""
    from faster_coco_eval.core import mask as coco

    return np.array(coco.toBbox(list(masks)) if masks else [], dtype=np.float64).reshape(-1, 4)


def _areas(masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    from faster_coco_eval.core import mask as coco

    return np.array(coco.area(list(masks)) if masks else [], dtype=np.float64)


def _ratio(above: int, below: int) -> float | None:
    return above / below if below else None
