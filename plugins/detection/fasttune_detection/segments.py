"""Segments of one image: masks with their classes, read from every form of truth into one type, and checked.

A row states its truth in one of three forms:

a mask of classes   `mask`, a picture whose pixels are ids; `objects` may name them: {"classes": {id: name}}
instances           `objects` as in object detection, with "masks" in the place of boxes, or beside them
panoptic            `mask`, a picture whose pixels are ids of segments (COCO: R + 256 G + 256² B), and `objects`,
                    {"segments": [{"id", "label", "thing", "crowd"}, …]}, or COCO's segments_info by itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fasttune.errors import DataError
from fasttune_detection.masks import Size, mask_of
from fasttune_detection.masks import from_rle as from_rle
from fasttune_detection.masks import to_rle as to_rle
from fasttune_detection.stated import ROLE, columns_of, finite, flag_of, label_of, nth, parsed
from fasttune_detection.truth import Ids, names_of, pixels_of, segments_of

if TYPE_CHECKING:
    from PIL import Image

SegmentKind = Literal["semantic", "instance", "panoptic"]
"""semantic: a class a pixel. instance: an object a mask. panoptic: both, each pixel in one segment at most."""


@dataclass(frozen=True)
class Reading:
    """How truth is read: the options of the task that say so.

    kind: what is made of it. classes: names of a mask's ids, in the place of what the data say; None: that, else
    the ids themselves. A colour's id is R + 256 G + 256² B. ignore: ids of a mask that are no truth. background:
    the class of pixels that no instance covers, for kinds semantic and panoptic; None: there is no truth. stuff:
    classes that are stuff, in the place of what the data say; None: that, else all are things.
    """

    kind: SegmentKind = "semantic"
    classes: Mapping[int, str] | None = None
    ignore: tuple[int, ...] = (255,)
    background: str | None = None
    stuff: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of one image.

    masks: bool [n, h, w], in pixels of the original image. labels: n class names. crowd: bool [n], objects that
    are not told apart (COCO's iscrowd). thing: bool [n], an object, not stuff; of kind semantic none is. void:
    bool [h, w], pixels that are no truth. stated: float64 [n], the area in pixels that the row states for a
    segment, NaN where it doesn't.
    """

    masks: np.ndarray
    labels: tuple[str, ...]
    crowd: np.ndarray
    thing: np.ndarray
    void: np.ndarray
    stated: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        one_each = [self.crowd, self.thing, *([] if self.stated is None else [self.stated])]
        if self.masks.shape != (count, *self.void.shape) or any(held.shape != (count,) for held in one_each):
            raise ValueError(f"{self.masks.shape} masks, {self.void.shape} void, {count} labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> Size:
        """(width, height)."""
        height, width = self.void.shape
        return width, height

    @property
    def areas(self) -> np.ndarray:
        """float64 [n]: what the row states, else the number of pixels."""
        counted = self.masks.sum((1, 2), dtype=np.float64)
        return counted if self.stated is None else np.where(np.isnan(self.stated), counted, self.stated)

    def take(self, keep: np.ndarray) -> Segments:
        """Those at `keep`: bool [n], or int positions in any order."""
        at = np.flatnonzero(keep) if keep.dtype == bool else keep
        stated = None if self.stated is None else self.stated[at]
        labels = tuple(self.labels[i] for i in at)
        return replace(
            self, masks=self.masks[at], labels=labels, crowd=self.crowd[at], thing=self.thing[at], stated=stated
        )


def read_segments(row: Mapping[str, Any], size: Size, reading: Reading) -> Segments:
    """What a row holds under `mask` (opened) and `objects`, as segments of the kind that is wanted.

    semantic: one segment a class, disjoint. instance: one an object, in the row's order; they may overlap; void is
    what a panoptic mask leaves out. panoptic: one a thing and one a class of stuff, disjoint. Of objects that
    overlap, later ones cover earlier ones where segments are disjoint; what is covered wholly is none.

    size: (width, height) of the image. Segments under `objects` are handed back as they are. Raises
    DataError(column, why) for truth that is broken, or that doesn't hold what is wanted.
    """
    held = row.get("objects")
    if isinstance(held, Segments):  # `vary` has read them already
        return held
    objects, mask = parsed(held), row.get("mask")
    if mask is not None and mask.size != size:
        found = f"{mask.size[0]} x {mask.size[1]} pixels; its image has {size[0]} x {size[1]}"
        raise DataError("mask", f"the mask has {found}")
    segments = _segments_in(objects, mask is not None)
    if segments is not None:
        return _panoptic(mask, segments, reading)
    only_names = objects is None or (isinstance(objects, Mapping) and objects.keys() <= {"classes"})
    if mask is not None and (only_names or reading.kind == "semantic"):
        return _semantic(mask, objects, reading)
    if objects is None:
        raise DataError(ROLE, "expected a mask or objects with masks, found neither")
    return _instances(objects, size, reading)


def _semantic(mask: Image.Image, objects: Any, reading: Reading) -> Segments:
    if reading.kind != "semantic":
        raise DataError(
            "mask",
            f"a mask of classes doesn't tell objects apart, as kind {reading.kind} needs; expected objects with "
            'masks, or {"segments": …} beside a panoptic mask; or set options.kind to semantic',
        )
    found = Ids.of(mask, names_of(objects, reading.classes))
    void = found.void(reading.ignore)
    groups: dict[str, list[int]] = {}
    for key in found.present(void):
        groups.setdefault(found.name(key), []).append(key)
    masks = np.zeros((len(groups), *void.shape), dtype=bool)
    for painted, keys in zip(masks, groups.values(), strict=True):
        for key in keys:
            painted |= found.ids == key
    return _of(masks & ~void, tuple(groups), void)


def _of(masks: np.ndarray, labels: tuple[str, ...], void: np.ndarray) -> Segments:
    """Of kind semantic: no crowds, no things."""
    none = np.zeros(len(labels), dtype=bool)
    return Segments(masks, labels, none, none.copy(), void)


def _segments_in(objects: Any, beside_mask: bool) -> Any:
    """The segments of a panoptic mask; None if it is something else that the row states. Beside a mask a list may
    stand by itself: hub sets' `segments_info`."""
    if isinstance(objects, Mapping):
        listed = isinstance(objects.get("id"), (list, tuple)) and beside_mask
        named = next((objects[key] for key in ("segments", "segments_info") if objects.get(key) is not None), None)
        return objects if listed and named is None else named
    of_ids = isinstance(objects, (list, tuple)) and all(
        isinstance(item, Mapping) and "id" in item for item in objects
    )
    return objects if of_ids and beside_mask and objects else None


def _panoptic(mask: Image.Image | None, stated: Any, reading: Reading) -> Segments:
    if mask is None:
        raise DataError("mask", "expected a panoptic mask beside the segments, found none")
    ids = pixels_of(mask)
    segments = segments_of(stated, reading.stuff)
    masks = np.zeros((len(segments), *ids.shape), dtype=bool)
    covered = np.isin(ids, (0, *reading.ignore))
    for i, segment in enumerate(segments):
        np.equal(ids, segment.id, out=masks[i])
        if not masks[i].any():
            why = f"{nth(i, len(segments), 'segment')} ({segment.label}): no pixel of the mask has its id"
            raise DataError(ROLE, f"{why} {segment.id}")
        covered |= masks[i]
    if not covered.all():
        strange = ids[~covered]
        raise DataError("mask", f"{strange.size} pixels have ids of no segment, such as {strange[0]}")
    found = Segments(
        masks,
        tuple(segment.label for segment in segments),
        np.array([segment.crowd for segment in segments], dtype=bool),
        np.array([segment.thing for segment in segments], dtype=bool),
        np.asarray(~masks.any(0)),
    )
    if reading.kind == "instance":
        return found.take(found.thing)
    return _by_class(found) if reading.kind == "semantic" else _stuff_joined(found)


def _instances(value: Any, size: Size, reading: Reading) -> Segments:
    columns = columns_of(value, "masks")
    columns.check_size(size)
    count = len(columns.masks)
    for name, held in (("labels", columns.labels), ("crowd flags", columns.crowd), ("areas", columns.area)):
        if held is not None and len(held) != count:
            raise DataError(ROLE, f"expected one of each a mask, found {count} masks and {len(held)} {name}")
    masks = np.zeros((count, size[1], size[0]), dtype=bool)
    labels = tuple(label_of(label, i, count, "object") for i, label in enumerate(columns.labels))
    for i, held in enumerate(columns.masks):
        try:
            masks[i] = mask_of(held, size, fractions=columns.form == "cxcywh")
        except ValueError as error:
            raise DataError(ROLE, f"{nth(i, count, 'object')} ({labels[i]}): {error}") from error
    flags = [flag_of(flag, i, count, "object") for i, flag in enumerate(columns.crowd or [False] * count)]
    crowd = np.array(flags, dtype=bool)
    thing = np.array([label not in (reading.stuff or ()) for label in labels], dtype=bool)
    whole = np.zeros((size[1], size[0]), dtype=bool)
    found = Segments(masks, labels, crowd, thing, whole, _areas(columns.area, count))
    if reading.kind == "instance":
        return found.take(found.thing)
    found = _disjoint(found, reading.background)
    return _by_class(found) if reading.kind == "semantic" else _stuff_joined(found)


def _areas(stated: list[Any] | None, count: int) -> np.ndarray | None:
    if stated is None:
        return None
    areas = np.full(count, np.nan)
    for i, held in enumerate(stated):
        if held is None or held != held:  # NaN is a table's way to say: not stated
            continue
        areas[i] = finite(held, f"{nth(i, count, 'object')}: its area")
        if areas[i] < 0:
            raise DataError(ROLE, f"{nth(i, count, 'object')}: expected an area in pixels, found {areas[i]:g}")
    return areas


def _disjoint(found: Segments, background: str | None) -> Segments:
    """Later segments cover earlier ones; what none covers is the background, a class of stuff, or void."""
    free = np.ones(found.void.shape, dtype=bool)
    masks = np.zeros_like(found.masks)
    for i in reversed(range(len(found))):
        np.logical_and(found.masks[i], free, out=masks[i])
        free &= ~masks[i]
    found = replace(found, masks=masks, stated=None)
    if background is not None and free.any():
        found = Segments(
            np.concatenate([found.masks, free[None]]),
            (*found.labels, background),
            np.append(found.crowd, False),
            np.append(found.thing, False),
            np.zeros_like(free),
        )
    else:
        found = replace(found, void=free)
    return found.take(np.asarray(found.masks.any((1, 2))))


def _by_class(found: Segments) -> Segments:
    """Of kind semantic, from disjoint segments."""
    labels = tuple(dict.fromkeys(found.labels))
    masks = np.zeros((len(labels), *found.void.shape), dtype=bool)
    for mask, label in zip(found.masks, found.labels, strict=True):
        masks[labels.index(label)] |= mask
    return _of(masks, labels, found.void)


def _stuff_joined(found: Segments) -> Segments:
    """One segment a class of stuff, at the place of its first; things and crowds as they are."""
    firsts: dict[str, int] = {}
    masks, keep = found.masks.copy(), np.ones(len(found), dtype=bool)
    for i, label in enumerate(found.labels):
        if not found.thing[i] and firsts.setdefault(label, i) != i:
            masks[firsts[label]] |= masks[i]
            keep[i] = False
    return replace(found, masks=masks, stated=None).take(keep)
