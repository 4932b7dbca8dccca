"""The value of a row's `objects` column, in any of its layouts, as lists with one entry an object.

What a single entry may be is said here too; what boxes must be together, and to the image, is said in `boxes`,
what masks must be in `masks`.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fasttune.errors import DataError, nearest

Format = Literal["xyxy", "xywh", "cxcywh"]
"""xyxy: two corners, pixels. xywh: corner and size, pixels. cxcywh: centre and size, fractions of the image's."""

FORMATS: tuple[Format, ...] = get_args(Format)
ROLE = "objects"

_BOXES: dict[str, Format] = {
    "boxes": "xyxy",
    "box": "xyxy",
    "bndbox": "xyxy",
    "bbox": "xywh",  # COCO's name and COCO's format
    "bboxes": "xywh",
}
_MASKS = ("masks", "mask", "segmentation", "segmentations")
LABELS = (
    "labels",
    "label",
    "categories",
    "category",
    "category_ids",
    "category_id",
    "class_labels",
    "classes",
    "class",
    "names",
    "name",
)
CROWD = ("crowd", "iscrowd", "is_crowd")
_AREA = ("area", "areas")
_FARTHEST = 2.0**24  # pixels; beyond it float32 loses whole ones
_CORNERS = ("xmin", "ymin", "xmax", "ymax")

Wanted = Literal["boxes", "masks"]
"""What a task needs of each object."""

_ONE: dict[Wanted, str] = {"boxes": "box", "masks": "mask"}


@dataclass(frozen=True)
class Columns:
    """One entry an object in each list; None: not stated, as are empty boxes or masks where the other is wanted.
    key: the name that the boxes stood under. size: width and height of the image."""

    key: str
    boxes: list[Any]
    masks: list[Any]
    labels: list[Any]
    crowd: list[Any] | None
    area: list[Any] | None
    form: Any
    size: tuple[int, int] | None = None

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Raises DataError if the image has another (width, height) than the row states: what was drawn on another
        picture, or on one that was resized or turned since, lies elsewhere in this one."""
        if size is None or self.size in (None, size):
            return
        width, height = self.size
        hint = "is this the file that was annotated?"
        if (height, width) == size:
            hint = "were the objects drawn before its EXIF rotation, or are width and height swapped?"
        elif abs(width * size[1] - height * size[0]) <= max(width, height, *size):  # alike but for rounding
            hint = "was it resized since it was annotated? Then the objects must be resized too"
        expected = f"expected an image of {width} x {height}, as the data state"
        raise DataError(ROLE, f"{expected}, found one of {size[0]} x {size[1]}: {hint}")


def parsed(value: Any) -> Any:
    """The column's value, read as JSON if it is text. Raises DataError for text that is none."""
    if not isinstance(value, str):
        return value.tolist() if isinstance(value, np.ndarray) else value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            ROLE, f"expected JSON with objects and labels, found text that is none: {error}"
        ) from error


def columns_of(value: Any, wanted: Wanted = "boxes") -> Columns:
    """The layouts that `boxes.read_annotations` names. Raises DataError for anything else."""
    value = parsed(value)
    if isinstance(value, Mapping):
        return _from_mapping(value, wanted)
    if isinstance(value, (list, tuple)):
        return _from_list(value, wanted)
    found = "nothing (null)" if value is None else f"{type(value).__name__} {value!r:.60}"
    raise DataError(ROLE, f"expected {wanted} and labels, found {found}; {_none(wanted)}")


def _none(wanted: Wanted) -> str:
    return f'an image without objects has {{"{wanted}": [], "labels": []}}'


def _from_mapping(value: Mapping[str, Any], wanted: Wanted) -> Columns:
    key, boxes = first_of(value, tuple(_BOXES))
    masks_key, masks = first_of(value, _MASKS)
    label_key, labels = first_of(value, LABELS)
    listed = {"boxes": _listed(boxes, key), "masks": _listed(masks, masks_key)}
    names, needed = _listed(labels, label_key), listed[wanted]
    nothing = needed is None and names is None and all(held is None for held in value.values())  # a table's {}
    missing = wanted if needed is None and not nothing else "labels" if needed and names is None else None
    if missing:
        keys = ", ".join(map(str, value))
        raise DataError(ROLE, f"expected the key {missing!r}, found none; {_none(wanted)}. Keys: {keys}.")
    crowd_key, crowd = first_of(value, CROWD)
    area_key, area = first_of(value, _AREA)
    return Columns(
        key,
        listed["boxes"] or [],
        listed["masks"] or [],
        names or [],
        _listed(crowd, crowd_key),
        _listed(area, area_key),
        value.get("format"),
        _size_of(value.get("size")),
    )


def _size_of(held: Any) -> tuple[int, int] | None:
    """(width, height), where the row states them; None for what else a hub set may call so: a size of each box."""
    sides = list(held) if isinstance(held, (list, tuple, np.ndarray)) else []
    whole = [int(side) for side in sides if isinstance(side, (int, np.integer))]
    return (whole[0], whole[1]) if len(whole) == len(sides) == 2 and min(whole) > 0 else None


def _from_list(items: Sequence[Any], wanted: Wanted) -> Columns:
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(
                ROLE,
                f"{nth(i, len(items))}: expected a mapping with a {_ONE[wanted]} and a label, found {item!r:.60}",
            )
    names = dict.fromkeys(name for item in items for name, held in item.items() if held is not None)

    def column(known: Sequence[str], wanted: str | None = None) -> tuple[str, list[Any] | None]:
        key = next((name for name in known if name in names), None)
        if key is not None:
            return key, [item.get(key) for item in items]
        if wanted and items:
            raise DataError(
                ROLE, f"expected the key {wanted!r} in each object, found only {', '.join(map(str, names))}"
            )
        return "", None

    key, boxes = column(tuple(_BOXES), "bbox" if wanted == "boxes" else None)
    return Columns(
        key,
        boxes or [],
        column(_MASKS, "segmentation" if wanted == "masks" else None)[1] or [],
        column(LABELS, "label")[1] or [],
        column(CROWD)[1],
        column(_AREA)[1],
        items[0].get("format") if items else None,
    )


def first_of(value: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of these names that the mapping holds something under; "" and None if there is none."""
    return next(((name, value[name]) for name in names if value.get(name) is not None), ("", None))


def _listed(held: Any, name: str) -> list[Any] | None:
    if held is None:
        return None
    if isinstance(held, (list, tuple, np.ndarray)):
        return list(held)
    raise DataError(
        ROLE, f"{name}: expected a list, one entry an object, found {type(held).__name__} {held!r:.60}"
    )


def nth(index: int, count: int, what: str = "box") -> str:
    """How messages call a box or an object: they count from 1, as they do rows."""
    return f"{what} {index + 1} of {count}"


def form_of(columns: Columns, box_format: Format | None) -> Format:
    """box_format, if it is given, wins over the row's own "format", and that over the name of the boxes' key."""
    mappings = [isinstance(box, Mapping) for box in columns.boxes]
    if any(mappings):  # they name their corners, whatever else is said
        if not all(mappings):
            raise DataError(ROLE, "expected boxes of one kind, found lists of numbers and mappings of corners")
        return "xyxy"
    if box_format is not None or columns.form is None:
        return box_format or _BOXES.get(columns.key, "xyxy")
    if columns.form not in FORMATS:
        known = ", ".join(FORMATS)
        close = nearest(str(columns.form), FORMATS)
        raise DataError(ROLE, f"format: expected one of {known}, found {columns.form!r:.60}.{close}")
    return columns.form


def four(box: Any, index: int, count: int) -> list[float]:
    if isinstance(box, Mapping) and all(name in box for name in _CORNERS):
        box = [box[name] for name in _CORNERS]
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4:
        raise DataError(ROLE, f"{nth(index, count)}: expected four numbers, found {box!r:.80}")
    found = [finite(number, f"{nth(index, count)}: {box!r:.80}") for number in box]
    if max(map(abs, found)) > _FARTHEST:
        raise DataError(ROLE, f"{nth(index, count)}: {box!r:.80} holds {max(found, key=abs):g}; expected pixels")
    return found


def finite(number: Any, where: str) -> float:
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, numbers.Real):
        raise DataError(ROLE, f"{where} holds {number!r:.40}, which is not a number; expected finite numbers")
    try:
        found = float(number)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise DataError(ROLE, f"{where} holds {found}; expected finite numbers")
    return found


def label_of(label: Any, index: int, count: int, what: str = "box") -> str:
    """A class name, or a class id as text."""
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, numbers.Integral) and not isinstance(label, bool):
        return str(int(label))
    found = "none" if label is None or label == "" else f"{type(label).__name__} {label!r:.60}"
    raise DataError(ROLE, f"{nth(index, count, what)}: expected a class (text or a whole number), found {found}")


def flag_of(flag: Any, index: int, count: int, what: str = "box") -> bool:
    if flag is None:
        return False
    if isinstance(flag, (bool, np.bool_, numbers.Real)) and flag in (0, 1):
        return bool(flag)
    raise DataError(ROLE, f"{nth(index, count, what)}: crowd: expected true or false (1 or 0), found {flag!r:.40}")
