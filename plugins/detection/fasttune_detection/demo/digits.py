"""Handwritten digits on sheets of paper, with exact boxes.

The digits are real: the 1797 that scikit-learn carries (E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten
Digits, UCI, 1998), 8 x 8 pixels each. The sheets are drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDES = {"pretraining": slice(0, 776), "train": slice(776, 1415), "valid": slice(1415, None)}
"""Rows of the set. It is in the order in which it was written: each form begins with 0 to 9, three times over, and
these borders are where a form begins. So no form is on two sides; 13 people filled in these 14."""

SIZE = (128, 96)  # of a picture: width, height
MOST = 6  # digits in it
_HEIGHTS = (18.0, 48.0)  # of a digit's 8 x 8 cell, in pixels
_TURN = 12.0  # degrees, at most
_FAINTEST = 0.15  # where less ink than that would be, there is none: a box ends where ink is to be seen
_CONTRAST = 70.0  # of ink and paper, in grey levels, at least
_OVERLAP = 0.1  # of the smaller of two boxes, at most
_TRIES = 40  # places that are tried for a digit before it is left out

Row = dict[str, Any]
Box = tuple[int, int, int, int]


def load(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Ink of the digits of a side, float32 [n, 8, 8] from 0 to 1, and what they are, int64 [n].

    Raises RuntimeError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(f"scikit-learn carries its digits ({error}): pip install scikit-learn") from error

    digits = load_digits()
    rows = SIDES[side]
    return (digits.images[rows] / 16).astype(np.float32), digits.target[rows]


def rows(side: str, count: int, seed: int) -> list[Row]:
    """{"image": PIL, "objects": {"boxes": xyxy in pixels, "labels": "0" to "9"}}, the same for the same seed."""
    inks, labels = load(side)
    chance = np.random.default_rng([seed, list(SIDES).index(side)])
    order = _endless(len(inks), chance)
    found = []
    for _ in range(count):
        chosen = [next(order) for _ in range(int(chance.integers(1, MOST + 1)))]
        picture, boxes = write(sheet(chance), [inks[i] for i in chosen], chance)
        names = [str(labels[i]) for i, box in zip(chosen, boxes, strict=True) if box]
        found.append({"image": picture, "objects": {"boxes": [list(b) for b in boxes if b], "labels": names}})
    return found


def _endless(count: int, chance: np.random.Generator) -> Iterator[int]:
    """All of them in a random order, again and again: each is seen as often as the others."""
    while True:
        yield from chance.permutation(count).tolist()


def sheet(chance: np.random.Generator) -> Image.Image:
    """Paper: a colour, uneven light, ruled lines on half of them, specks and grain."""
    width, height = SIZE
    light = chance.uniform(-1, 1, (3, 4)).astype(np.float32)
    light = np.asarray(Image.fromarray(light).resize(SIZE, Image.Resampling.BICUBIC))[..., None]
    colour = chance.uniform(60, 240) + chance.uniform(-15, 15, 3)
    picture = Image.fromarray(_bytes(colour + 12 * light + np.zeros((height, width, 3))))
    pen = ImageDraw.Draw(picture)
    if chance.random() < 0.5:
        ink = tuple(_bytes(colour + chance.uniform(-40, 40)).tolist())
        step, slope = chance.uniform(12, 30), chance.uniform(-4, 4)
        for y in np.arange(chance.uniform(0, step), height, step):
            pen.line([0, y, width, y + slope], fill=ink)
    for _ in range(int(chance.integers(0, 12))):
        x, y = chance.uniform(0, width), chance.uniform(0, height)
        wide, high = chance.uniform(0.5, 3, 2)
        pen.ellipse([x, y, x + wide, y + high], fill=tuple(_bytes(colour + chance.uniform(-80, 80)).tolist()))
    grain = chance.normal(0, chance.uniform(1, 7), (height, width, 1))
    return Image.fromarray(_bytes(np.asarray(picture) + grain))


def write(
    paper: Image.Image, inks: list[np.ndarray], chance: np.random.Generator
) -> tuple[Image.Image, list[Box | None]]:
    """The paper with digits on it, and the box of each one's ink: None of one that no room was found for. The
    first always finds room."""
    values = np.asarray(paper, dtype=np.float32)
    grey = float(values.mean())
    boxes: list[Box | None] = []
    colour = _ink(grey, chance)
    for ink in inks:
        cover = _written(ink, chance)
        box = _place(cover.shape, [box for box in boxes if box], chance)
        boxes.append(box)
        if box:
            left, top, right, bottom = box
            part = values[top:bottom, left:right]
            values[top:bottom, left:right] += cover[..., None] * (colour - part)
    return Image.fromarray(_bytes(values)), boxes


def _ink(grey: float, chance: np.random.Generator) -> np.ndarray:
    """A colour, darker or lighter than the paper."""
    ranges = [(low, high) for low, high in ((0, grey - _CONTRAST), (grey + _CONTRAST, 255)) if high - low > 10]
    low, high = ranges[int(chance.integers(len(ranges)))]
    return np.clip(chance.uniform(low, high) + chance.uniform(-25, 25, 3), 0, 255)


def _written(ink: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """A digit's ink in its new size, turned a little, float32 [h, w] from 0 to 1, without empty edges."""
    high = chance.uniform(*_HEIGHTS)
    wide = high * chance.uniform(0.8, 1.2)
    margin = np.pad(ink, 2)  # room to turn in
    size = (max(1, round(wide * 1.5)), max(1, round(high * 1.5)))
    large = Image.fromarray(margin).resize(size, Image.Resampling.BICUBIC)
    turned = np.asarray(large.rotate(chance.uniform(-_TURN, _TURN), Image.Resampling.BICUBIC))
    cover = np.clip((turned - 0.2) / 0.4, 0, 1)  # strokes with edges: 8 x 8 pixels alone would be a blur
    cover = np.where(cover < _FAINTEST, 0, cover)
    down, across = (np.flatnonzero(cover.any(axis)) for axis in (1, 0))
    return cover[down[0] : down[-1] + 1, across[0] : across[-1] + 1]


def _place(shape: tuple[int, ...], taken: list[Box], chance: np.random.Generator) -> Box | None:
    high, wide = shape
    for _ in range(_TRIES):
        left, top = (int(chance.integers(side + 1)) for side in (SIZE[0] - wide, SIZE[1] - high))
        box = (left, top, left + wide, top + high)
        if all(_overlap(box, other) <= _OVERLAP for other in taken):
            return box
    return None


def _overlap(one: Box, other: Box) -> float:
    """As a share of the smaller box."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    least = min(math.prod((box[2] - box[0], box[3] - box[1])) for box in (one, other))
    return max(0, wide) * max(0, high) / least


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).round().astype(np.uint8)
