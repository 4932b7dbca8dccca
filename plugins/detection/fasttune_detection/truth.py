"""The pixels of a mask as ids, the names of ids, and the segments that a panoptic mask's ids stand for."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fasttune.errors import DataError
from fasttune_detection.places import listed
from fasttune_detection.stated import CROWD, LABELS, ROLE, first_of, flag_of, label_of, nth

if TYPE_CHECKING:
    from PIL import Image

_THING = ("thing", "isthing", "is_thing")


def pixels_of(mask: Image.Image) -> np.ndarray:
    """The ids of a mask, int [h, w]: of a coloured one R + 256 G + 256² B, int32; of a palette the indices."""
    pixels = np.asarray(mask)
    if pixels.ndim == 2:
        return pixels
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 65536 * blue


@dataclass(frozen=True)
class Ids:
    """A mask of classes. ids: int [h, w]. names: of ids, None for those that are no truth; None: ids are their own
    names. coloured: ids are R + 256 G + 256² B."""

    ids: np.ndarray
    names: Mapping[int, str | None] | None
    coloured: bool

    @classmethod
    def of(cls, mask: Image.Image, named: Names) -> Ids:
        """Raises DataError for colours without names. A palette's colours count only if it is colours that have
        names: else its indices are the ids."""
        if named.colours and mask.mode == "P":
            mask = mask.convert("RGB")
        coloured = mask.mode == "RGB"
        if coloured and named.names is None:
            raise DataError(
                "mask",
                "the mask is in colours (RGB), and nothing says which class a colour is; expected ids (grey or "
                "palette), a palette file, or options.classes with ids R + 256 G + 65536 B",
            )
        if named.colours and not coloured:
            raise DataError("mask", f"the classes are named by colours, and the mask has none (mode {mask.mode})")
        return cls(pixels_of(mask), named.names, coloured)

    def void(self, ignore: Iterable[int]) -> np.ndarray:
        """bool [h, w]: ids that are ignored, or named null. Of colours only the latter: 255 is pure red."""
        dropped = [] if self.coloured else list(ignore)
        dropped += [key for key, name in (self.names or {}).items() if name is None]
        void = np.zeros(self.ids.shape, dtype=bool)
        for key in dropped:
            void |= self.ids == key
        return void

    def present(self, void: np.ndarray) -> list[int]:
        """Ids that occur where there is truth, sorted. Raises DataError for one that has no name."""
        ids = self.ids[~void] if void.any() else self.ids.ravel()
        if ids.dtype.kind == "u" and ids.dtype.itemsize <= 2:
            found = np.flatnonzero(np.bincount(ids, minlength=1)).tolist()
        else:
            found = np.unique(ids).tolist()
        for key in found:
            if self.names is not None and key not in self.names:
                count = int((ids == key).sum())
                why = f"{count} pixels are {self.said(key)}, which is not among {self._classes()}"
                grey = self.coloured and key % 256 == key // 256 % 256 == key // 65536
                raise DataError("mask", f"{why}; are its channels alike? Save one of them" if grey else why)
        return found

    def said(self, key: int) -> str:
        return f"of the colour {key % 256},{key // 256 % 256},{key // 65536}" if self.coloured else str(key)

    def _classes(self) -> str:
        return listed({key: name for key, name in (self.names or {}).items() if name is not None})

    def name(self, key: int) -> str:
        return str(key) if self.names is None else str(self.names[key])


@dataclass(frozen=True)
class Names:
    """names: by id; None: nothing names them. colours: the ids are colours, R + 256 G + 256² B."""

    names: Mapping[int, str | None] | None
    colours: bool = False


def names_of(objects: Any, stated: Mapping[int, str] | None) -> Names:
    """Names of a mask's ids: those of the options, else of the row, {"classes": {id or "r,g,b": name}}; a class
    named null is no truth. Raises DataError for names that are none."""
    if stated is not None:
        return Names(dict(stated))
    held = objects.get("classes") if isinstance(objects, Mapping) else None
    if held is None:
        return Names(None)
    if isinstance(held, (list, tuple)):
        held = dict(enumerate(held))
    if not isinstance(held, Mapping) or not held:
        raise DataError(ROLE, f"classes: expected names by id, found {held!r:.60}")
    colours = any(isinstance(key, str) and "," in key for key in held)
    names: dict[int, str | None] = {}
    for key, name in held.items():
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise DataError(
                ROLE, f"classes: {key!r:.40}: expected a name, or null for no truth, found {name!r:.60}"
            )
        names[packed(key) if colours else whole(key)] = name and name.strip()
    return Names(names, colours)


def whole(key: Any) -> int:
    """An id, perhaps as text, as JSON's keys are."""
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        return int(key)
    if isinstance(key, str) and key.strip().lstrip("-").isdecimal():
        return int(key)
    raise DataError(ROLE, f"expected an id, a whole number, found {key!r:.40}")


def packed(colour: Any) -> int:
    """R + 256 G + 256² B of "r,g,b"."""
    parts = [part.strip() for part in colour.split(",")] if isinstance(colour, str) else []
    if len(parts) != 3 or not all(part.isdecimal() and int(part) < 256 for part in parts):
        raise DataError(ROLE, f'expected a colour "r,g,b", 0 to 255 each, found {colour!r:.40}')
    red, green, blue = map(int, parts)
    return red + 256 * green + 65536 * blue


@dataclass(frozen=True)
class Segment:
    """A segment of a panoptic mask, as its row states it."""

    id: int
    label: str
    thing: bool
    crowd: bool


def segments_of(value: Any, stuff: tuple[str, ...] | None) -> list[Segment]:
    """The row's segments, [{"id", "label", "thing", "crowd"}, …] or COCO's names, or lists by name, as some hub
    sets have them. stuff: classes that are stuff, whatever the row says. Raises DataError."""
    if isinstance(value, Mapping) and value and all(isinstance(held, (list, tuple)) for held in value.values()):
        if len({len(held) for held in value.values()}) > 1:
            raise DataError(ROLE, f"segments: expected lists of one length, found {value!r:.80}")
        value = [dict(zip(value, held, strict=True)) for held in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise DataError(ROLE, f"segments: expected a list, found {type(value).__name__} {value!r:.60}")
    found: dict[int, Segment] = {}
    for i, item in enumerate(value):
        said = nth(i, len(value), "segment")
        if not isinstance(item, Mapping):
            raise DataError(ROLE, f"{said}: expected a mapping with id and label, found {item!r:.60}")
        try:
            key = whole(item.get("id"))
        except DataError as error:
            raise DataError(ROLE, f"{said}: {error.why}") from error
        if key in found:
            raise DataError(ROLE, f"{said}: its id {key} is that of a segment before it")
        label = label_of(first_of(item, LABELS)[1], i, len(value), "segment")
        thing = first_of(item, _THING)[1]
        if thing not in (None, True, False, 0, 1):
            raise DataError(ROLE, f"{said}: thing: expected true or false, found {thing!r:.40}")
        is_thing = label not in stuff if stuff is not None else thing is None or bool(thing)
        crowd = flag_of(first_of(item, CROWD)[1], i, len(value), "segment")
        found[key] = Segment(key, label, is_thing, crowd)
    return list(found.values())
