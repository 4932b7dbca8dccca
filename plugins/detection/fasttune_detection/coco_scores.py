"""COCO's average precision and recall over images, by faster-coco-eval: of boxes, and of masks.

What is kept: 56 bytes and a label an object or detection, and of masks their compressed runs; nothing of an image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

IouType = Literal["bbox", "segm"]
Rle = Mapping[str, Any]  # {"size": [height, width], "counts": COCO's compressed text}

_AREAS = ("all", "small", "medium", "large")  # the order of COCO's parameters; small ends at 32², medium at 96²
_MOST = (1, 10, 100)  # detections of a class and an image
_AT_50, _AT_75 = 0, 5  # among the ten thresholds 0.5, 0.55, … 0.95


class Regions(NamedTuple):
    """Objects, or detections, of one image.

    labels: n names. boxes: float64 [n, 4], xywh in pixels. area: float64 [n]. weight: float64 [n], the score of a
    detection, or whether a truth is a crowd. masks: n of them where masks are compared, else empty.
    """

    labels: tuple[str, ...]
    boxes: np.ndarray
    area: np.ndarray
    weight: np.ndarray
    masks: tuple[Rle, ...] = ()

    def of(self, name: str) -> Regions:
        """Those of one class."""
        at = [i for i, label in enumerate(self.labels) if label == name]
        masks = tuple(self.masks[i] for i in at) if self.masks else ()
        return Regions((name,) * len(at), self.boxes[at], self.area[at], self.weight[at], masks)


class _Image(NamedTuple):
    place: tuple[Any, ...]
    digest: bytes
    truths: Regions
    found: Regions


class CocoScores:
    """mAP and mAR as COCO counts them; equal to pycocotools.

    A class is what some truth names; detections of others count nowhere, as in COCO.

    Ties: COCO ranks equal scores by the order of the images, and within an image by the order of its detections.
    Images stand here in the order of their paths, numbers in them by value, and where rows have no path by a hash
    of what is in them: so that the result is that of any other order of rows, and of any split over ranks.
    """

    def __init__(self) -> None:
        self.images: list[_Image] = []

    def add(self, image: Any, truths: Regions, found: Regions) -> None:
        """image: what the row holds of it: a path, or a mapping that has one."""
        digest = hashlib.blake2b(repr((truths.labels, found.labels)).encode(), digest_size=16)
        for regions in (truths, found):
            for array in (regions.boxes, regions.area, regions.weight):
                digest.update(array.tobytes())
            for mask in regions.masks:
                digest.update(repr((mask["size"], mask["counts"])).encode())
        self.images.append(_Image(_place(image), digest.digest(), truths, found))

    def merge(self, other: CocoScores) -> None:
        self.images += other.images

    def result(self, iou_type: IouType) -> dict[str, Any]:
        """mAP and mAR by name, and under "per_class" those of each class that has truths; None where there is no
        truth of the kind to find."""
        names = sorted({name for image in self.images for name in image.truths.labels})
        by_class: dict[str, list[tuple[Regions, Regions]]] = {name: [] for name in names}
        for image in sorted(self.images, key=lambda image: (image.place, image.digest)):
            for name, truths, found in _by_class(image):
                if name in by_class:
                    by_class[name].append((truths, found))
        scores = {name: _average(pairs, iou_type) for name, pairs in by_class.items()}
        metrics = ("mAP", "mAP50", "mAP75", *(f"mAP_{size}" for size in _AREAS[1:]))
        metrics += (*(f"mAR{most}" for most in _MOST), *(f"mAR_{size}" for size in _AREAS[1:]))
        return {
            **{metric: mean([score[metric[1:]] for score in scores.values()]) for metric in metrics},
            "per_class": {
                name: {**score, "objects": sum(len(truths.labels) for truths, _ in by_class[name])}
                for name, score in scores.items()
            },
        }


def mean(values: Any) -> float | None:
    """Of what is neither None nor -1, COCO's mark of what has no truths; None if nothing is left."""
    held = np.array([value for value in np.ravel(values) if value is not None and value > -1], dtype=np.float64)
    return float(held.mean()) if held.size else None


def _place(image: Any) -> tuple[Any, ...]:
    """The path of a row's image, so that "page 9" sorts before "page 10"; () if it has none."""
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        return ()
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path)))


def _by_class(image: _Image) -> Iterator[tuple[str, Regions, Regions]]:
    for name in {*image.truths.labels, *image.found.labels}:
        yield name, image.truths.of(name), image.found.of(name)


def _average(images: Sequence[tuple[Regions, Regions]], iou_type: IouType) -> dict[str, float | None]:
    """AP and AR of one class over (truths, detections) an image: {"AP", "AP50", …, "AR1", …, "AR_large"}.

    Class by class, since the library's tables have a cell a pair of image and class, empty or not.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truths, found = COCO(print_function=_silent), COCO(print_function=_silent)
    stated = _annotations([pair[0] for pair in images], "iscrowd", int)
    claimed = _annotations([pair[1] for pair in images], "score", float)
    numbered = [{"id": i, **_size(pair)} for i, pair in enumerate(images, start=1)]
    for coco, listed in ((truths, stated), (found, claimed)):
        coco.dataset = {"images": numbered, "categories": [{"id": 1}], "annotations": listed}
        coco.createIndex()
    evaluation = COCOeval_faster(truths, found, iou_type, print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    # [thresholds, recalls, 1, areas, most] and [thresholds, 1, areas, most]; -1: no such truth
    precision, recall = evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]
    return {
        "AP": mean(precision[:, :, 0, -1]),
        "AP50": mean(precision[_AT_50, :, 0, -1]),
        "AP75": mean(precision[_AT_75, :, 0, -1]),
        **{f"AP_{name}": mean(precision[:, :, i, -1]) for i, name in enumerate(_AREAS) if i},
        **{f"AR{most}": mean(recall[:, 0, i]) for i, most in enumerate(_MOST)},
        **{f"AR_{name}": mean(recall[:, i, -1]) for i, name in enumerate(_AREAS) if i},
    }


def _size(pair: tuple[Regions, Regions]) -> dict[str, int]:
    """Height and width, by which the library reads masks."""
    masks = pair[0].masks or pair[1].masks
    return dict(zip(("height", "width"), masks[0]["size"], strict=True)) if masks else {}


def _annotations(images: Sequence[Regions], weight: str, kind: type) -> list[dict[str, Any]]:
    """Ids count from 1: for the library a match with 0 is none."""
    listed: list[dict[str, Any]] = []
    for i, regions in enumerate(images, start=1):
        for at, (box, area, value) in enumerate(
            zip(regions.boxes.tolist(), regions.area.tolist(), regions.weight, strict=True)
        ):
            annotation = {"id": len(listed) + 1, "image_id": i, "category_id": 1, "bbox": box, "area": area}
            if regions.masks:
                annotation["segmentation"] = regions.masks[at]
            listed.append({**annotation, weight: kind(value)})
    return listed


def _silent(*_: object) -> None:
    """Where the library would log."""
