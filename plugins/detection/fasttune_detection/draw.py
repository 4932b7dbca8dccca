"""Pictures for people: boxes with their classes drawn in, and several of them on one sheet."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_SHOWN = 8
_ROW = 4  # pictures side by side
_CELL = 480  # pixels, the longest side of a picture on a sheet
_GAP = 8
_PAPER = (40, 40, 40)
_SMALL = 256  # pixels; a picture whose longest side is shorter is enlarged, so that labels leave room for it
_LONGEST = 40  # characters of a label


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
    factor = max(1, _SMALL // max(image.size))
    picture = image.convert("RGB").resize([side * factor for side in image.size], Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 300))
    pen.font = ImageFont.load_default(max(12, round(max(picture.size) / 45)))
    known = [*classes, *sorted(set(labels) - set(classes))]
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
        place = _place(area, pen.textbbox((0, 0), text), picture.size, taken)
        taken.append(place)
        pen.rectangle(place, fill=ink)
        light = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] > 140  # as the eye weighs red, green and blue
        pen.text((place[0] + 2, place[1] + 1), text, fill=(0, 0, 0) if light else (255, 255, 255))
    return picture


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


def _place(box: Area, text: Any, size: tuple[int, int], taken: Sequence[Area]) -> Area:
    """Where a label goes: above its box, inside it, below it, at its right end; the first place inside the picture
    that no other label has, else the first one."""
    width, height = text[2] + 4, text[3] + 3  # textbbox starts at the origin, not at the ink
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
    found = found or [(max(0.0, min(left, size[0] - 1 - width)), 0.0, width, float(height))]
    free = (area for area in found if not any(_overlap(area, other) for other in taken))
    return next(free, found[0])


def _overlap(one: Area, other: Area) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
