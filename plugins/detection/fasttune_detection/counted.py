"""What a task counts of the images of train, as names beside those of classes, and what follows from it.

No class bears such a name: they begin with a blank, and names of classes have none around them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

from fasttune.errors import DataError
from fasttune_detection.boxes import Size
from fasttune_detection.segments import Reading
from fasttune_detection.stated import parsed
from fasttune_detection.truth import segments_of

_STUFF = " stuff "


def size_name(size: Size) -> str:
    """size: (width, height)."""
    return f" {size[0]}x{size[1]}"


def stuff_names(classes: Iterable[str]) -> Iterable[str]:
    return (_STUFF + name for name in classes)


def found_in(counts: Mapping[str, int], options: Any, kind: str, per_image: str) -> dict[str, Any]:
    """Values of those options that nobody has set, and that follow from the images of train: the medians
    `image_size` and `edges`, and `per_image`, the mean number of objects. Raises DataError if there is no object.

    kind: what an object is called."""
    sizes = Counter({_size_of(name): count for name, count in counts.items() if _is_size(name)})
    objects = sum(count for name, count in counts.items() if not name.startswith(" "))
    images = sizes.total()
    if images and not objects:
        raise DataError(None, f"none of the {images:,} images to train on has a {kind}: nothing is to be learned")
    found: dict[str, Any] = {}
    if images and options.image_size is None:
        found["image_size"] = (_median(sizes, itemgetter(0)), _median(sizes, itemgetter(1)))
    if images and options.edges is None:
        found["edges"] = (_median(sizes, min), _median(sizes, max))
    if images and getattr(options, per_image) is None:
        found[per_image] = objects / images
    return found


def stuff_of(row: Mapping[str, Any], reading: Reading) -> Iterable[str]:
    """The classes of a row that are stuff, of kind panoptic. Raises DataError for segments that are broken."""
    objects = parsed(row.get("objects"))
    if isinstance(objects, Mapping) and objects.get("segments") is not None:
        return {segment.label for segment in segments_of(objects["segments"], reading.stuff) if not segment.thing}
    return {*(reading.stuff or ()), *([reading.background] if reading.background else [])}


def stuff_in(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(name.removeprefix(_STUFF) for name in counts if name.startswith(_STUFF)))


def _is_size(name: str) -> bool:
    return name.startswith(" ") and not name.startswith(_STUFF)


def _size_of(name: str) -> Size:
    width, _, height = name.strip().partition("x")
    return int(width), int(height)


def _median(sizes: Counter[Size], edge: Callable[[Size], int]) -> int:
    """The lower median of an edge over all images."""
    edges: Counter[int] = Counter()
    for size, count in sizes.items():
        edges[edge(size)] += count
    seen, half = 0, (edges.total() + 1) // 2
    for length in sorted(edges):
        seen += edges[length]
        if seen >= half:
            return length
    raise ValueError("no images")
