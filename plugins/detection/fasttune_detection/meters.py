"""The streaming metrics of boxes: COCO's average precision and recall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fasttune_detection.boxes import Format, convert, read_annotations
from fasttune_detection.coco_scores import CocoScores, Regions
from fasttune_detection.stated import ROLE


class DetectionMeter:
    """mAP and mAR of boxes, as `CocoScores` counts them. Sizes are areas in pixels of the original image: what the
    row states under "area" (in COCO, the mask's), else the box's."""

    def __init__(self, box_format: Format | None = None):
        self.box_format, self.scores = box_format, CocoScores()

    def update(self, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """prediction: {"boxes": n of [x1, y1, x2, y2] in pixels of the original image, "labels": n names,
        "scores": n numbers}, and "size", its [width, height], where truths are stated in fractions. reference: the
        row by role; its `objects` are read by `read_annotations`, whose DataError it raises.

        Raises ValueError for a prediction of unequal lengths, or with numbers that are not finite.
        """
        size = prediction.get("size")
        stated = read_annotations(reference[ROLE], self.box_format, tuple(size) if size else None)
        truths = Regions(stated.labels, stated.spans, stated.area, stated.crowd.astype(np.float64))
        self.scores.add(reference.get("image"), truths, _found(prediction))

    def merge(self, other: DetectionMeter) -> None:
        self.scores.merge(other.scores)

    def result(self) -> dict[str, Any]:
        return self.scores.result("bbox")


def _found(prediction: Mapping[str, Any]) -> Regions:
    labels = tuple(map(str, prediction["labels"]))
    boxes = np.array(prediction["boxes"], dtype=np.float64).reshape(-1, 4)
    scores = np.array(prediction["scores"], dtype=np.float64).reshape(-1)
    if not len(boxes) == len(scores) == len(labels):
        raise ValueError(f"a prediction has {len(boxes)} boxes, {len(labels)} labels and {len(scores)} scores")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError("a prediction has boxes or scores that are not finite")
    spans = convert(boxes, "xyxy", "xywh")
    return Regions(labels, spans, spans[:, 2] * spans[:, 3], scores)
