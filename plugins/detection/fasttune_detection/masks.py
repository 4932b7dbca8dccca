"""A mask as data state it, polygons or run lengths, as a picture of bools; and back, as run lengths.

COCO's forms (cocodataset.org/#format-data): polygons [[x1, y1, x2, y2, …], …], whose union is the mask, in pixels,
the first one from 0 to 1; {"size": [height, width], "counts"}, lengths of runs down the columns, of zeros first,
as a list or in COCO's compressed text. All is checked before faster-coco-eval's C++ sees it, which trusts its
caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Size = tuple[int, int]  # width, height

_OUTSIDE = 1 + 1e-6  # pixel that a polygon may lie outside the frame, as rounding leaves it
_FLAT = 1e-6  # pixel; points that are this near to one line enclose nothing
_LONGEST = 8  # characters of a run's length: 5 bits each, so 2**40 pixels
_FORMS = 'polygons [[x1, y1, x2, y2, x3, y3, …], …] or run lengths {"size": [height, width], "counts"}'


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, bool [h, w]: {"size": [h, w], "counts": text}."""
    from faster_coco_eval.core import mask as coco

    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in mask.shape], "counts": encoded["counts"].decode("ascii")}


def from_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The mask, bool [h, w], of run lengths. Raises ValueError for what is not one or doesn't fill its size."""
    height, width = size_of(rle)
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        lengths = _decompressed(counts.encode("utf-8") if isinstance(counts, str) else counts)
    else:
        lengths = np.asarray(counts if counts is not None else "none")
        if lengths.ndim != 1 or (lengths.dtype.kind not in "iu" and len(lengths)):
            raise ValueError(f"counts: expected text or a list of whole numbers, found {counts!r:.40}")
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"counts: a run has the length {lengths.min()}; expected 0 or more")
    if (total := sum(lengths.tolist())) != height * width:  # Python's sum doesn't wrap around
        raise ValueError(f"counts add up to {total}; expected {height * width}, {height} x {width} pixels")
    ones = np.arange(len(lengths)) % 2 == 1
    return np.ascontiguousarray(np.repeat(ones, lengths).reshape(width, height).T)


def size_of(rle: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of run lengths. Raises ValueError for anything else than two whole numbers above 0."""
    size = rle.get("size")
    sides = list(size) if isinstance(size, (list, tuple, np.ndarray)) else []
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise ValueError(f"size: expected [height, width], found {size!r:.40}")
    return int(sides[0]), int(sides[1])


def mask_of(stated: Any, size: Size, fractions: bool = False) -> np.ndarray:
    """The mask, bool [h, w], that an object of an image of this size states. fractions: polygons are given in
    shares of width and height.

    Raises ValueError for polygons that are no pairs of finite numbers, have fewer than three points, enclose
    nothing or leave the frame by more than a pixel; for run lengths of another size or that are none; and for a
    mask without a pixel.
    """
    if isinstance(stated, Mapping):
        height, width = size_of(stated)
        if (width, height) != size:
            raise ValueError(f"run lengths of {width} x {height} pixels; the image has {size[0]} x {size[1]}")
        mask = from_rle(stated)
    elif _is_list(stated) and len(stated):
        mask = _painted(
            [_checked(polygon, i, size, fractions) for i, polygon in enumerate(_polygons(stated))], size
        )
    else:
        found = "none" if stated is None or stated == [] else f"{type(stated).__name__} {stated!r:.40}"
        raise ValueError(f"expected a mask, {_FORMS}, found {found}")
    if not mask.any():
        raise ValueError("the mask covers no pixel")
    return mask


def _polygons(stated: Any) -> list[Any]:
    """A list of polygons; a single one may stand there by itself."""
    if not any(_is_list(item) for item in stated):
        return [stated]
    if all(_is_list(item) and len(item) == 2 and not any(map(_is_list, item)) for item in stated):
        raise ValueError(f"expected {_FORMS}, found pairs [[x, y], …]; put all numbers of a polygon into one list")
    return list(stated)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _checked(polygon: Any, index: int, size: Size, fractions: bool) -> np.ndarray:
    """float64 [points * 2], pixels."""
    said = f"polygon {index + 1}"
    try:
        numbers = np.asarray(polygon)
    except ValueError as error:  # lists in lists, of unequal lengths
        raise ValueError(f"{said}: expected numbers x1, y1, x2, y2, …, found {polygon!r:.40}") from error
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iuf" and len(numbers)):
        raise ValueError(f"{said}: expected numbers x1, y1, x2, y2, …, found {polygon!r:.40}")
    if len(numbers) % 2:
        raise ValueError(f"{said}: expected pairs of x and y, found {len(numbers)} numbers")
    if len(numbers) < 6:
        raise ValueError(f"{said}: expected at least 3 points, found {len(numbers) // 2}")
    points = numbers.astype(np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError(f"{said}: expected finite numbers, found {points[~np.isfinite(points)][0]}")
    sides = np.array(size, dtype=np.float64)
    if fractions:
        if points.max() > 1.5:  # what is a little above 1 leaves the frame
            raise ValueError(f"{said}: expected fractions from 0 to 1, found {points.max():g}, as in pixels")
        points = points * sides
    elif 0 < points.max() <= 1 and points.min() >= 0 and max(size) > 1:
        raise ValueError(
            f"{said}: expected pixels, found no number above 1, as in fractions; multiply them by width and height"
        )
    beyond = np.concatenate([-points.min(0), points.max(0) - sides])
    if beyond.max() > _OUTSIDE:
        side = ("left", "top", "right", "bottom")[int(beyond.argmax())]
        raise ValueError(
            f"{said}: reaches {beyond.max():g} pixels beyond the {side} edge of the {size[0]} x {size[1]} image; "
            "expected at most 1"
        )
    if _is_flat(points):
        raise ValueError(f"{said}: its {len(points)} points lie on one line, and enclose nothing")
    return points.ravel()


def _is_flat(points: np.ndarray) -> bool:
    """Whether all points lie on one line. Not their signed area: that of an eight is none, too."""
    away = points - points[0]
    far = away[int((away**2).sum(1).argmax())]
    length = float(np.hypot(*far))
    return length < _FLAT or bool((np.abs(away[:, 0] * far[1] - away[:, 1] * far[0]) / length).max() < _FLAT)


def _painted(polygons: list[np.ndarray], size: Size) -> np.ndarray:
    from faster_coco_eval.core import mask as coco

    width, height = size
    rles = coco.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    return np.ascontiguousarray(coco.decode(coco.merge(rles)), dtype=bool)


def _decompressed(text: bytes) -> np.ndarray:
    """int64 run lengths of COCO's compressed text: 5 bits a character from `0` on, lowest first, the sixth bit
    says that more follow, the last one's fifth is the sign; from the fourth length on, differences from the one
    before the last."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) and (codes.min() < 0 or codes.max() > 63):
        at = int(((codes < 0) | (codes > 63)).argmax())
        raise ValueError(f"counts: the byte {text[at]} at {at} is none of compressed run lengths")
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes) or ends[-1:].tolist() != [len(codes) - 1]:
        raise ValueError(
            "counts: compressed run lengths end within a number" if len(codes) else "counts are empty"
        )
    starts = np.concatenate([[0], ends[:-1] + 1])
    widths = ends - starts + 1
    if widths.max() > _LONGEST:
        raise ValueError(f"counts: a length of {widths.max()} characters; expected at most {_LONGEST}")
    places = np.arange(len(codes)) - np.repeat(starts, widths)
    lengths = np.add.reduceat((codes & 31) << (5 * places), starts)
    lengths = lengths - np.where(codes[ends] & 16, np.int64(1) << (5 * widths), 0)
    lengths[1::2], lengths[2::2] = lengths[1::2].cumsum(), lengths[2::2].cumsum()
    return lengths
