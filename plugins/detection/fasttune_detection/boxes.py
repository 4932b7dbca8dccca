"""Boxes of one image: read from every layout into one type, checked; converted, resized, clipped.

Inside, a box is xyxy: left, top, right, bottom in pixels, float32, where the first pixel covers 0 to 1. Everything
else is converted here, at the door, and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttune.errors import DataError
from fasttune_detection.stated import (
    FORMATS,
    ROLE,
    Format,
    columns_of,
    finite,
    flag_of,
    form_of,
    four,
    label_of,
    nth,
)

Size = tuple[int, int]  # width, height

_OUTSIDE = 1.0  # pixel that a box may lie outside the frame, as rounding leaves it; it is clipped


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image.

    boxes: float32 [n, 4], xyxy in pixels. labels: n class names. crowd: bool [n], a box around many objects that
    are not told apart (COCO's iscrowd).
    """

    boxes: np.ndarray
    labels: tuple[str, ...]
    crowd: np.ndarray

    def __post_init__(self) -> None:
        if not (self.boxes.shape == (len(self.labels), 4) and self.crowd.shape == (len(self.labels),)):
            raise ValueError(
                f"{self.boxes.shape} boxes, {len(self.labels)} labels, {self.crowd.shape} crowd flags"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, keep: np.ndarray) -> Objects:
        """Those at `keep`: bool [n], or int positions in any order."""
        positions = np.flatnonzero(keep) if keep.dtype == bool else keep
        return Objects(self.boxes[positions], tuple(self.labels[i] for i in positions), self.crowd[positions])


@dataclass(frozen=True, eq=False)
class Annotations:
    """The objects of one image as the row states them, checked, before anything is rounded or clipped.

    corners: float64 [n, 4], xyxy in pixels. spans: float64 [n, 4], xywh in pixels. area: float64 [n], pixels: what
    the row states (COCO: of the mask), else the box's. labels, crowd: as in `Objects`.
    """

    corners: np.ndarray
    spans: np.ndarray
    area: np.ndarray
    labels: tuple[str, ...]
    crowd: np.ndarray


def read_objects(value: Any, box_format: Format | None, size: Size | None) -> Objects:
    """The objects that a row states: what `read_annotations` takes and raises, clipped to the frame if `size` is
    given."""
    stated = read_annotations(value, box_format, size)
    corners = stated.corners if size is None else np.clip(stated.corners, 0, [*size, *size])
    return Objects(corners.astype(np.float32), stated.labels, stated.crowd)


def read_annotations(value: Any, box_format: Format | None, size: Size | None) -> Annotations:
    """What a row holds under `objects`.

    value: {"boxes", "labels"} with perhaps "format", "crowd" and "area"; a hub set's {"bbox", "category", …}; a
    list of {"bbox", "category_id", …}; or any of these as JSON text. Boxes are four numbers each, or a mapping of
    xmin, ymin, xmax, ymax. No boxes at all is valid.
    box_format: of the numbers; None: what the row says, else xywh for "bbox" and xyxy for "boxes".
    size: (width, height) of the image; None: whether boxes lie in the frame is not checked, and fractions can't be
    read.

    Raises DataError for boxes that are not four finite numbers, have no area, or leave the frame by more than a
    pixel; for boxes that look like another format; for labels, crowd flags or areas that are not one a box; and
    for an image of another size than the row states ("size", [width, height], as COCO's JSON has it).
    """
    columns = columns_of(value)
    count = len(columns.boxes)
    columns.check_size(size)
    for name, held in (("labels", columns.labels), ("crowd flags", columns.crowd), ("areas", columns.area)):
        if held is not None and len(held) != count:
            raise DataError(ROLE, f"expected one of each a box, found {count} boxes and {len(held)} {name}")
    form = form_of(columns, box_format) if count else "xyxy"
    rows = [four(box, i, count) for i, box in enumerate(columns.boxes)]
    stated = np.array(rows, dtype=np.float64).reshape(-1, 4)
    labels = tuple(label_of(label, i, count) for i, label in enumerate(columns.labels))
    if form == "cxcywh" and size is None:
        raise DataError(ROLE, "boxes are fractions (cxcywh), which mean nothing without the image's size")
    _must_look_like(stated, form, size)
    corners = convert(stated, form, "xyxy", size)
    _check(corners, stated, form, size)
    spans = convert(stated, form, "xywh", size)
    flags = [flag_of(flag, i, count) for i, flag in enumerate(columns.crowd or [False] * count)]
    return Annotations(corners, spans, _areas(columns.area, spans), labels, np.array(flags, dtype=bool))


def convert(boxes: np.ndarray, have: Format, want: Format, size: Size | None = None) -> np.ndarray:
    """Boxes [n, 4] in another format, in their own dtype. size: (width, height), for cxcywh on either side."""
    if have == want:
        return boxes.copy()
    first, second = boxes[:, :2], boxes[:, 2:]
    if "cxcywh" in (have, want):
        if size is None:
            raise ValueError("fractions need the image's size")
        sides = np.array(size, dtype=boxes.dtype)
    if have == "cxcywh":
        spans = np.hstack([(first - second / 2) * sides, second * sides])
        return convert(spans, "xywh", want, size)
    if want == "cxcywh":
        spans = convert(boxes, have, "xywh")
        return np.hstack([(spans[:, :2] + spans[:, 2:] / 2) / sides, spans[:, 2:] / sides])
    return np.hstack([first, first + second if have == "xywh" else second - first])


def resized(objects: Objects, old: Size, new: Size) -> Objects:
    """The objects of an image that was resized from `old` to `new`, both (width, height)."""
    factors = np.array([new[0] / old[0], new[1] / old[1]] * 2)
    return Objects((objects.boxes * factors).astype(np.float32), objects.labels, objects.crowd)


def clipped(objects: Objects, size: Size) -> Objects:
    """Boxes cut at the frame; those of which nothing is left are dropped."""
    boxes = np.clip(objects.boxes, 0, np.array([*size, *size], dtype=np.float32))
    whole = Objects(boxes, objects.labels, objects.crowd)
    return whole.take((boxes[:, 2:] > boxes[:, :2]).all(1))


def _areas(stated: list[Any] | None, spans: np.ndarray) -> np.ndarray:
    areas = spans[:, 2] * spans[:, 3]
    for i, held in enumerate(stated or []):
        if held is None or (isinstance(held, float) and math.isnan(held)):  # a table's way to say: not stated
            continue
        areas[i] = finite(held, f"{nth(i, len(areas))}: its area")
        if areas[i] < 0:
            raise DataError(ROLE, f"{nth(i, len(areas))}: expected an area in pixels, found {areas[i]:g}")
    return areas


def _must_look_like(stated: np.ndarray, form: Format, size: Size | None) -> None:
    """Fractions where pixels are expected, and pixels where fractions are: seen on all boxes of the image."""
    if not len(stated):
        return
    largest = stated.max()
    if form == "cxcywh":
        if largest > 1.5:  # what is a little above 1 is a box that leaves the frame
            i = int(stated.max(1).argmax())
            raise DataError(
                ROLE,
                f"{nth(i, len(stated))}: {_text(stated[i])} was expected in cxcywh, fractions from 0 to 1, and "
                "looks like pixels; set options.box_format to xywh or xyxy, whichever it is",
            )
    elif 0 < largest <= 1 and stated.min() >= 0 and (size is None or max(size) > 1):
        raise DataError(
            ROLE,
            f"{nth(0, len(stated))}: {_text(stated[0])} was expected in {form}, pixels, but no number of this "
            "image is above 1, as in fractions; set options.box_format to cxcywh if they are centre, width and "
            "height, else multiply them by the image's width and height",
        )


def _check(corners: np.ndarray, stated: np.ndarray, form: Format, size: Size | None) -> None:
    """Raises DataError for the first box that is turned around, has no area, or leaves the frame."""

    def fail(i: int, why: str) -> None:
        raise DataError(
            ROLE, f"{nth(i, len(stated))}: {_text(stated[i])} ({form}) {why}{_hint(stated, form, size)}"
        )

    rounded = corners.astype(np.float32)  # as the loss sees them
    for i, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        for low, high, side, far, near in (
            (x1, x2, "width", "right", "left"),
            (y1, y2, "height", "bottom", "top"),
        ):
            if high < low:
                fail(
                    i,
                    f"has its {far} edge at {high:g} before its {near} edge at {low:g}; expected a {side} above 0",
                )
    empty = (rounded[:, 2:] <= rounded[:, :2]).any(1)
    if empty.any():
        i = int(empty.argmax())
        wide, high = corners[i, 2:] - corners[i, :2]
        fail(i, f"has no area, {wide:g} x {high:g} pixels; expected width and height above 0")
    if size is None:
        return
    edges = np.array([*size, *size], dtype=np.float64)
    beyond = np.hstack([-corners[:, :2], corners[:, 2:] - edges[2:]])
    left = np.clip(rounded, 0, edges.astype(np.float32))
    outside = (beyond > _OUTSIDE).any(1) | (left[:, 2:] <= left[:, :2]).any(1)
    if outside.any():
        i = int(outside.argmax())
        side = ("left", "top", "right", "bottom")[int(beyond[i].argmax())]
        fail(
            i,
            f"reaches {beyond[i].max():g} pixels beyond the {side} edge of the {size[0]} x {size[1]} image; "
            "expected at most 1, which is clipped",
        )


def _hint(stated: np.ndarray, form: Format, size: Size | None) -> str:
    """What would make all boxes of the image good: another format, or the frame before its EXIF rotation."""
    for other in FORMATS:
        if other != form and "cxcywh" not in (other, form) and _all_fit(stated, other, size):
            meant = f"set options.box_format to {other} if that is what they are"
            return f". All boxes of this image are good as {other}: {meant}"
    if size is not None and form != "cxcywh" and _all_fit(stated, form, (size[1], size[0])):
        return f". All boxes fit an image of {size[1]} x {size[0]}: were they drawn before its EXIF rotation?"
    return ""


def _all_fit(stated: np.ndarray, form: Format, size: Size | None) -> bool:
    corners = convert(stated, form, "xyxy")
    fits = (corners[:, 2:] > corners[:, :2]).all() and (corners >= -_OUTSIDE).all()
    return bool(fits and (size is None or (corners[:, 2:] <= np.array(size) + _OUTSIDE).all()))


def _text(box: np.ndarray) -> str:
    return f"[{', '.join(f'{number:g}' for number in box)}]"
