"""Streaming metrics: COCO's average precision and recall of detections, the confusion of semantic segmentation.

A detection meter keeps 56 bytes and a label a box, of truths and detections alike, and nothing of any image; a
segmentation meter keeps one count a pair of classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fasttune.errors import DataError
from fasttune_detection.boxes import Format, convert, read_annotations
from fasttune_detection.stated import ROLE

IouType = Literal["bbox"]

_AREAS = ("all", "small", "medium", "large")  # the order of COCO's parameters; small ends at 32², medium at 96²
_MOST = (1, 10, 100)  # detections of a class and an image
_AT_50, _AT_75 = 0, 5  # among the ten thresholds 0.5, 0.55, … 0.95


class _Regions(NamedTuple):
    """labels: n names. boxes: float64 [n, 4], xywh in pixels. area: float64 [n]. weight: float64 [n], the score of
    a detection, or whether a truth is a crowd."""

    labels: tuple[str, ...]
    boxes: np.ndarray
    area: np.ndarray
    weight: np.ndarray


class _Image(NamedTuple):
    place: tuple[Any, ...]
    digest: bytes
    truths: _Regions
    found: _Regions


class DetectionMeter:
    """mAP and mAR as COCO counts them, by faster-coco-eval; equal to pycocotools.

    A class is what some truth names; detections of others count nowhere, as in COCO. Sizes are areas in pixels of
    the original image: what the row states under "area" (in COCO, the mask's), else the box's.

    Ties: COCO ranks equal scores by the order of the images, and within an image by the order of its detections.
    Images stand here in the order of their paths, numbers in them by value, and where rows have no path by a hash
    of their boxes: so that the result is that of any other order of rows, and of any split over ranks.
    """

    def __init__(self, box_format: Format | None = None, iou_type: IouType = "bbox"):
        self.box_format, self.iou_type = box_format, iou_type
        self.images: list[_Image] = []

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """prediction: {"boxes": n of [x1, y1, x2, y2] in pixels of the original image, "labels": n names,
        "scores": n numbers}, and "size", its [width, height], where truths are stated in fractions. reference: the
        row by role; its `objects` are read by `read_annotations`, whose DataError it raises.

        Raises ValueError for a prediction of unequal lengths, or with numbers that are not finite.
        """
        size = prediction.get("size")
        stated = read_annotations(reference[ROLE], self.box_format, tuple(size) if size else None)
        truths = _Regions(stated.labels, stated.spans, stated.area, stated.crowd.astype(np.float64))
        found = _found(prediction)
        digest = hashlib.blake2b(repr((truths.labels, found.labels)).encode(), digest_size=16)
        for array in (*truths[1:], *found[1:]):
            digest.update(array.tobytes())
        self.images.append(_Image(_place(reference.get("image")), digest.digest(), truths, found))

    def merge(self, other: DetectionMeter) -> None:
        self.images += other.images

    def result(self) -> dict[str, Any]:
        """mAP and mAR by name, and under "per_class" those of each class that has truths; None where there is no
        truth of the kind to find."""
        names = sorted({name for image in self.images for name in image.truths.labels})
        by_class: dict[str, list[tuple[_Regions, _Regions]]] = {name: [] for name in names}
        for image in sorted(self.images, key=lambda image: (image.place, image.digest)):
            for name, truths, found in _by_class(image):
                if name in by_class:
                    by_class[name].append((truths, found))
        scores = {name: _average(pairs, self.iou_type) for name, pairs in by_class.items()}
        metrics = ("mAP", "mAP50", "mAP75", *(f"mAP_{size}" for size in _AREAS[1:]))
        metrics += (*(f"mAR{most}" for most in _MOST), *(f"mAR_{size}" for size in _AREAS[1:]))
        return {
            **{metric: _mean([score[metric[1:]] for score in scores.values()]) for metric in metrics},
            "per_class": {
                name: {**score, "objects": sum(len(truths.labels) for truths, _ in by_class[name])}
                for name, score in scores.items()
            },
        }


def _found(prediction: Mapping[str, Any]) -> _Regions:
    labels = tuple(map(str, prediction["labels"]))
    boxes = np.array(prediction["boxes"], dtype=np.float64).reshape(-1, 4)
    scores = np.array(prediction["scores"], dtype=np.float64).reshape(-1)
    if not len(boxes) == len(scores) == len(labels):
        raise ValueError(f"a prediction has {len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError("a prediction has boxes or scores that are not finite")
    spans = convert(boxes, "xyxy", "xywh")
    return _Regions(labels, spans, spans[:, 2] * spans[:, 3], scores)


def _place(image: Any) -> tuple[Any, ...]:
    """The path of a row's image, so that "page 9" sorts before "page 10"; () if it has none."""
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        return ()
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path)))


def _by_class(image: _Image) -> Iterator[tuple[str, _Regions, _Regions]]:
    def of(regions: _Regions, name: str) -> _Regions:
        at = np.array([i for i, label in enumerate(regions.labels) if label == name], dtype=np.int64)
        return _Regions((name,) * len(at), regions.boxes[at], regions.area[at], regions.weight[at])

    for name in {*image.truths.labels, *image.found.labels}:
        yield name, of(image.truths, name), of(image.found, name)


def _average(images: Sequence[tuple[_Regions, _Regions]], iou_type: IouType) -> dict[str, float | None]:
    """AP and AR of one class over (truths, detections) an image: {"AP", "AP50", …, "AR1", …, "AR_large"}.

    Class by class, since the library's tables have a cell a pair of image and class, empty or not.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truths, found = COCO(print_function=_silent), COCO(print_function=_silent)
    stated = _annotations([pair[0] for pair in images], "iscrowd", int)
    claimed = _annotations([pair[1] for pair in images], "score", float)
    numbered = [{"id": i} for i in range(1, len(images) + 1)]
    for coco, listed in ((truths, stated), (found, claimed)):
        coco.dataset = {"images": numbered, "categories": [{"id": 1}], "annotations": listed}
        coco.createIndex()
    evaluation = COCOeval_faster(truths, found, iou_type, print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    # [thresholds, recalls, 1, areas, most] and [thresholds, 1, areas, most]; -1: no such truth
    precision, recall = evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]
    return {
        "AP": _mean(precision[:, :, 0, -1]),
        "AP50": _mean(precision[_AT_50, :, 0, -1]),
        "AP75": _mean(precision[_AT_75, :, 0, -1]),
        **{f"AP_{name}": _mean(precision[:, :, i, -1]) for i, name in enumerate(_AREAS) if i},
        **{f"AR{most}": _mean(recall[:, 0, i]) for i, most in enumerate(_MOST)},
        **{f"AR_{name}": _mean(recall[:, i, -1]) for i, name in enumerate(_AREAS) if i},
    }


def _annotations(images: Sequence[_Regions], weight: str, kind: type) -> list[dict[str, Any]]:
    """Ids count from 1: for the library a match with 0 is none."""
    listed: list[dict[str, Any]] = []
    for i, regions in enumerate(images, start=1):
        for box, area, value in zip(regions.boxes.tolist(), regions.area.tolist(), regions.weight, strict=True):
            annotation = {"id": len(listed) + 1, "image_id": i, "category_id": 1, "bbox": box, "area": area}
            listed.append({**annotation, weight: kind(value)})
    return listed


def _silent(*_: object) -> None:
    """Where the library would log."""


def _mean(values: Any) -> float | None:
    """Of what is neither None nor -1, the marks of what has no truths; None if nothing is left."""
    held = np.array([value for value in np.ravel(values) if value is not None and value > -1], dtype=np.float64)
    return float(held.mean()) if held.size else None


class SegmentationMeter:
    """mIoU, pixel accuracy and both by class, from counts[i][j]: pixels of class i that were predicted as class j.

    ignore_index: truth pixels of this id count nowhere.
    """

    def __init__(self, classes: Sequence[str], ignore_index: int = 255):
        if 0 <= ignore_index < len(classes):
            raise ValueError(f"ignore_index {ignore_index} is the id of class {classes[ignore_index]!r}")
        self.classes, self.ignore_index = tuple(classes), ignore_index
        self.counts = np.zeros((len(classes), len(classes)), dtype=np.int64)

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Both hold "mask", class ids [height, width] of the original image.

        Raises DataError for a truth of another size or with an id that is no class, ValueError for a prediction
        with one.
        """
        predicted, truth = np.asarray(prediction["mask"]), np.asarray(reference["mask"])
        if predicted.shape != truth.shape:
            wanted, found = (" x ".join(map(str, mask.shape)) for mask in (predicted, truth))
            raise DataError("mask", f"expected height and width of the image, {wanted}, found {found}")
        counted = truth != self.ignore_index
        truth, predicted = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
        most = len(self.classes)
        if truth.size and not 0 <= truth.min() <= truth.max() < most:
            wrong = truth.min() if truth.min() < 0 else truth.max()
            raise DataError(
                "mask", f"expected class ids 0 to {most - 1}, or {self.ignore_index} to ignore, found {wrong}"
            )
        if predicted.size and not 0 <= predicted.min() <= predicted.max() < most:
            raise ValueError(f"a prediction holds ids {predicted.min()} to {predicted.max()} of {most} classes")
        self.counts += np.bincount(truth * most + predicted, minlength=most * most).reshape(most, most)

    def merge(self, other: SegmentationMeter) -> None:
        """Raises ValueError if the other meter counts other classes."""
        if self.classes != other.classes:
            raise ValueError(f"meters of different classes can't be merged: {self.classes}, {other.classes}")
        self.counts += other.counts

    def result(self) -> dict[str, Any]:
        """mIoU and mean accuracy over the classes that have one; None where nothing was counted. A class that is
        neither true nor predicted anywhere has no IoU, one without true pixels no accuracy."""
        hits, actual, claimed = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
        union = actual + claimed - hits
        per_class = {
            name: {
                "IoU": _ratio(hits[i], union[i]),
                "accuracy": _ratio(hits[i], actual[i]),
                "pixels": int(actual[i]),
            }
            for i, name in enumerate(self.classes)
        }
        return {
            "mIoU": _mean([held["IoU"] for held in per_class.values()]),
            "pixel_accuracy": _ratio(hits.sum(), actual.sum()),
            "mean_accuracy": _mean([held["accuracy"] for held in per_class.values()]),
            "per_class": per_class,
        }


def _ratio(above: Any, below: Any) -> float | None:
    return float(above / below) if below else None
