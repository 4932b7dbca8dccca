"""Pictures for people: boxes or segments with their classes drawn in, and several of them on one sheet."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_SHOWN = 8
_ROW = 4  # pictures side by side
_CELL = 480  # pixels, the longest side of a picture on a sheet
_GAP = 8
_PAPER = (40, 40, 40)
_SMALL = 480  # pixels; a picture whose longest side is shorter is enlarged, so that labels leave room for it
_LONGEST = 40  # characters of a label
_VEIL = 0.45  # of a segment's colour over the picture
_ROOMY = 4  # times the area of its label: a smaller segment would be hidden by it


def draw(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str],
    scores: Sequence[float] | None,
    classes: Sequence[str] = (),
) -> Image.Image:
    """A copy of an image with its boxes, xyxy in pixels, in the colour of their class, each with a label. A small
    image is enlarged by a whole factor.

    classes: all there are, so that a class has one colour in all pictures; else those of this one share them.
    """
    picture, factor = _enlarged(image)
    pen = _pen(picture)
    width = _line(picture)
    known = _known(classes, labels)
    scored = [None] * len(labels) if scores is None else scores
    drawn: list[tuple[Area, Colour, str]] = []
    for box, label, score in zip(boxes, labels, scored, strict=True):
        left, top, right, bottom = (float(edge) * factor for edge in box)
        text = _text(label, score, lambda text: pen.textlength(text) <= picture.width - 8)
        drawn.append(((left, top, right, bottom), colour(known.index(label)), text))
        edges = (left, top, max(left, right - 1), max(top, bottom - 1))  # Pillow draws the last pixel too
        pen.rectangle(edges, outline=drawn[-1][1], width=width)
    taken: list[Area] = []
    for area, ink, text in drawn:  # above all boxes
        place = _place(area, _size_of(text, pen), picture.size, taken)
        taken.append(place)
        _write(pen, place, text, ink)
    return picture


def draw_segments(
    image: Image.Image,
    masks: Sequence[np.ndarray],
    labels: Sequence[str],
    scores: Sequence[float | None] | None,
    classes: Sequence[str] = (),
) -> Image.Image:
    """A copy of an image with its segments in the colour of their class: a veil, an outline, and a label.

    masks: bool [height, width] of the image; they may overlap, and small ones lie above large ones. A label stands
    in its segment, or beside the largest part where there is no room. scores, classes and small images: as for
    `draw`. Raises ValueError for a mask of another size.
    """
    for mask in masks:
        if mask.shape != image.size[::-1]:
            raise ValueError(f"a mask of {mask.shape[1]} x {mask.shape[0]} for an image of {image.size}")
    picture, factor = _enlarged(image)
    known = _known(classes, labels)
    scored = [None] * len(labels) if scores is None else scores
    found = list(zip((_grown(mask, factor) for mask in masks), labels, scored, strict=True))
    found = sorted((held for held in found if held[0].any()), key=lambda held: -int(held[0].sum()))
    pixels = np.array(picture, dtype=np.float32)
    for mask, label, _ in found:
        pixels[mask] = (1 - _VEIL) * pixels[mask] + _VEIL * np.array(colour(known.index(label)))
    for mask, label, _ in found:
        pixels[_edge(mask, _line(picture))] = colour(known.index(label))
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen = _pen(picture)
    taken: list[Area] = []
    for mask, label, score in reversed(found):  # small ones have the least choice
        text = _text(label, score, lambda text: pen.textlength(text) <= picture.width - 8)
        size = _size_of(text, pen)
        part = _largest(mask)
        place = _within(mask, part, size, taken) or _place(_around(part), size, picture.size, taken)
        taken.append(place)
        _write(pen, place, text, colour(known.index(label)), framed=True)
    return picture


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """A copy in RGB, enlarged by a whole factor if it is small; the factor."""
    factor = max(1, _SMALL // max(image.size))
    return image.convert("RGB").resize([side * factor for side in image.size], Image.Resampling.NEAREST), factor


def _grown(mask: np.ndarray, factor: int) -> np.ndarray:
    return mask if factor == 1 else mask.repeat(factor, 0).repeat(factor, 1)


def _pen(picture: Image.Image) -> ImageDraw.ImageDraw:
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(max(12, round(min(max(picture.size) / 45, min(picture.size) / 8))))
    return pen


def _line(picture: Image.Image) -> int:
    return max(2, round(max(picture.size) / 300))


def _known(classes: Sequence[str], labels: Sequence[str]) -> list[str]:
    return [*classes, *sorted(set(labels) - set(classes))]


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """bool [h, w]: the pixels of a mask that are less than `width` from those outside it, not from the frame."""
    from scipy import ndimage

    return mask & ~ndimage.binary_erosion(mask, iterations=width, border_value=1)


def _around(mask: np.ndarray) -> Area:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _largest(mask: np.ndarray) -> np.ndarray:
    """bool [h, w]: the largest of the parts that a mask falls into."""
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    return mask if count < 2 else parts == np.bincount(parts.ravel())[1:].argmax() + 1


def _within(mask: np.ndarray, part: np.ndarray, size: tuple[int, int], taken: Sequence[Area]) -> Area | None:
    """Where a label of this (width, height) covers most of a mask, bool [h, w]; as near to the centre of its
    largest part as can be. None if there is too little of the segment for a label, or too little is free."""
    width, height = size
    if mask.sum() < _ROOMY * width * height or mask.shape[0] <= height or mask.shape[1] <= width:
        return None
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    # covered[y, x]: pixels of the mask under a label whose corner is there
    covered = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    for left, top, right, bottom in taken:
        rows = slice(max(0, math.floor(top) - height + 1), math.ceil(bottom))
        covered[rows, max(0, math.floor(left) - width + 1) : math.ceil(right)] = -1
    if covered.max() < width * height / 2:
        return None
    centre = [float(places.mean()) for places in np.nonzero(part)]
    y, x = np.nonzero(covered == covered.max())
    near = ((y + height / 2 - centre[0]) ** 2 + (x + width / 2 - centre[1]) ** 2).argmin()
    return float(x[near]), float(y[near]), float(x[near] + width), float(y[near] + height)


def _size_of(text: str, pen: ImageDraw.ImageDraw) -> tuple[int, int]:
    """Width and height of a label."""
    _, _, right, bottom = pen.textbbox((0, 0), text)  # it starts at the origin, not at the ink
    return math.ceil(right) + 4, math.ceil(bottom) + 3


def _write(pen: ImageDraw.ImageDraw, place: Area, text: str, ink: Colour, framed: bool = False) -> None:
    """framed: what is around the label may be of its own colour."""
    pen.rectangle(place, fill=ink, outline=(0, 0, 0) if framed else None)
    light = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] > 140  # as the eye weighs red, green and blue
    pen.text((place[0] + 2, place[1] + 1), text, fill=(0, 0, 0) if light else (255, 255, 255))


def colour(index: int) -> Colour:
    """Of the class at this place: hues by the golden angle, whose first ones lie far apart however many there are,
    in three shades."""
    saturation, value = ((0.9, 1.0), (0.65, 0.75), (0.45, 1.0))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.381966 % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def as_image(values: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """What a model sees, as a picture again. values: float32 [3, height, width]; mean, std: of each channel, as
    the processor normalised values of 0 to 1 (0 and 1 where it did not)."""
    factor, offset = (np.asarray(part, dtype=np.float32).reshape(3, 1, 1) for part in (std, mean))
    shades = np.clip(255 * (values * factor + offset), 0, 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(shades.transpose(1, 2, 0)))


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """The first eight images in a grid of four a row, large ones made smaller. ValueError if there is none."""
    if not images:
        raise ValueError("a sheet needs an image")
    cells = [_fitted(image.convert("RGB")) for image in images[:_SHOWN]]
    columns = min(_ROW, len(cells))
    rows = -(-len(cells) // columns)
    wide, high = (max(cell.size[axis] for cell in cells) + _GAP for axis in (0, 1))
    page = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), _PAPER)
    for i, cell in enumerate(cells):
        page.paste(cell, (i % columns * wide + _GAP, i // columns * high + _GAP))
    return page


def _fitted(image: Image.Image) -> Image.Image:
    factor = min(1.0, _CELL / max(image.size))
    if factor == 1:
        return image
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)


def _text(label: str, score: float | None, fits: Callable[[str], bool]) -> str:
    """The class, cut where the picture is too narrow for it, and the score."""
    name = " ".join(label.split())
    ending = "" if score is None else f" {score:.2f}"
    cuts = (f"{name[:length]}…{ending}" for length in range(min(len(name), _LONGEST) - 1, 0, -1))
    whole = [name + ending] if len(name) <= _LONGEST else []
    return next(filter(fits, [*whole, *cuts]), f"{name[:1]}…{ending}")


def _place(box: Area, label: tuple[int, int], size: tuple[int, int], taken: Sequence[Area]) -> Area:
    """Where a label goes: above its box, inside it, below it, at its right end; the first place inside the picture
    that no other label has, else the first one."""
    width, height = label
    left, top, right, bottom = box
    found = []
    for x, y in (
        (left, top - height),
        (left, top),
        (left, bottom),
        (right - width, top - height),
        (right - width, top),
    ):
        x = max(0.0, min(x, size[0] - 1 - width))
        if y >= 0 and y + height < size[1]:
            found.append((x, y, x + width, y + height))
    if not found:  # the picture is as flat as that
        x = max(0.0, min(left, size[0] - 1 - width))
        found = [(x, 0.0, x + width, float(height))]
    free = (area for area in found if not any(_overlap(area, other) for other in taken))
    return next(free, found[0])


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
