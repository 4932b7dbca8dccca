"""Augmentation of an image with its objects or segments: scale jitter, crop, flip, colours; all drawn from one
generator.

Every one of them leaves the image's size as it is, so that batches that were planned by size keep their padding
and their cost. The geometric ones are drawn as a `Move`, which carries image, objects and masks along alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fasttune_detection.boxes import Objects, Size
from fasttune_detection.segments import Segments

Truth = Objects | Segments
_Truth = TypeVar("_Truth", Objects, Segments)
Probability = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0.1, le=10)]

_FILL = (124, 116, 104)  # ImageNet's mean, which normalisation makes 0; around an image that was made smaller
_TRIES = 50  # windows that are drawn before an image is left whole, as in SSD
_VISIBLE = 0.3  # the share of a box that a window must show to be taken
_ASPECT = 4 / 3  # how far a window's aspect ratio may leave the image's
_SMALLEST = 1.0  # pixel; what is cut or shrunk below it is no object any more, as in RT-DETR


class AugmentOptions(BaseModel):
    """What is done to an image of train, each time that it is seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: Probability = Field(0.5, description="Share of images mirrored left to right; 0 turns it off.")
    scale: tuple[Factor, Factor] | None = Field(
        (0.8, 1.25),
        description="Least and greatest factor of size, inside the image's own frame; null turns it off.",
    )
    crop: Probability = Field(0.5, description="Share of images of which a window is cut out; 0 turns it off.")
    crop_side: float = Field(0.5, gt=0, le=1, description="Shortest side of a window, as a share of the image's.")
    colour: Probability = Field(
        0.5, description="Share of images whose brightness is changed; contrast, saturation, hue alike; 0 is off."
    )

    @model_validator(mode="after")
    def _scale_ascends(self) -> AugmentOptions:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: expected the least factor first, found {list(self.scale)}")
        return self


@dataclass(frozen=True)
class Move:
    """Part of an image, resized into part of a frame of the image's own size, and perhaps mirrored.

    size: (width, height) before and after. window: left, top, right, bottom of what is seen, in pixels of the
    image. target: where it lands, in whole pixels.
    """

    size: Size
    window: tuple[float, float, float, float]
    target: tuple[int, int, int, int]
    mirrored: bool = False

    def image(
        self, image: Image.Image, fill: Any = _FILL, resample: Any = Image.Resampling.BILINEAR
    ) -> Image.Image:
        """For a mask: the fill that it ignores, and Image.Resampling.NEAREST."""
        whole = (0, 0, *self.size)
        left, top, right, bottom = self.target
        if self.window != self.target:
            image = image.resize((right - left, bottom - top), resample, box=self.window)
        if self.target != whole:
            frame = Image.new(image.mode, self.size, fill)
            frame.paste(image, (left, top))
            image = frame
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """float64 [n, 4], xyxy, of boxes like that; not clipped."""
        window, target = (np.array(corners, dtype=np.float64) for corners in (self.window, self.target))
        factors = (target[2:] - target[:2]) / (window[2:] - window[:2])
        found = (boxes.astype(np.float64) - np.tile(window[:2], 2)) * np.tile(factors, 2) + np.tile(target[:2], 2)
        if self.mirrored:
            found[:, [0, 2]] = self.size[0] - found[:, [2, 0]]
        return found

    def objects(self, objects: Objects) -> Objects:
        """Those whose centre stays in the frame (SSD's rule), cut at it; without those of which less than a pixel
        of width or height is left."""
        boxes = self.boxes(objects.boxes)
        sides = np.array(self.size, dtype=np.float64)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        cut = np.clip(boxes, 0, np.tile(sides, 2))
        before, after = (box[:, 2:] - box[:, :2] for box in (objects.boxes, cut))
        # A box that was smaller before stays if it is not made smaller still; 1e-3: float32 rounds in between.
        large_enough = (after >= np.minimum(before, _SMALLEST) * (1 - 1e-3)).all(1)
        keep = ((centres > 0) & (centres < sides)).all(1) & large_enough
        return Objects(cut.astype(np.float32), objects.labels, objects.crowd).take(keep)

    def segments(self, segments: Segments) -> Segments:
        """Those of which a pixel is left, each pixel that of the image whose middle is nearest; what lies around a
        smaller image is void."""
        masks, void = self._pixels(segments.masks, False), self._pixels(segments.void, True)
        return replace(segments, masks=masks, void=void, stated=None).take(np.asarray(masks.any((1, 2))))

    def _pixels(self, pixels: np.ndarray, fill: bool) -> np.ndarray:
        """bool [..., h, w], moved as Pillow's Resampling.NEAREST does."""
        left, top, right, bottom = self.target
        if self.window != self.target:
            rows = _nearest(self.window[1], self.window[3], bottom - top)
            columns = _nearest(self.window[0], self.window[2], right - left)
            pixels = pixels.take(rows, axis=-2).take(columns, axis=-1)
        if self.target != (0, 0, *self.size):
            frame = np.full((*pixels.shape[:-2], *self.size[::-1]), fill)
            frame[..., top:bottom, left:right] = pixels
            pixels = frame
        return np.ascontiguousarray(pixels[..., ::-1]) if self.mirrored else pixels


def augment(
    image: Image.Image, truth: _Truth, rng: np.random.Generator, options: AugmentOptions
) -> tuple[Image.Image, _Truth]:
    """The image (RGB) and its objects or segments, augmented as the options say; equal generators give equal
    results."""
    for draw in MOVES:
        move = draw(image.size, truth, rng, options)
        if move is not None:
            image = move.image(image)
            truth = move.segments(truth) if isinstance(truth, Segments) else move.objects(truth)
    return recoloured(image, rng, options), truth


def draw_scale(size: Size, truth: Truth, rng: np.random.Generator, options: AugmentOptions) -> Move | None:
    """Scale jitter (Ghiasi et al. 2021): the image becomes smaller, anywhere in its frame, or larger, and is cut
    at it. Logarithms of factors are uniform, so that half of 0.8 to 1.25 enlarge."""
    if options.scale is None:
        return None
    low, high = options.scale
    factor = math.exp(rng.uniform(math.log(low), math.log(high)))
    if factor >= 1:
        window = _window(size, truth, rng, lambda: (1 / factor, 1 / factor))
        return Move(size, window, (0, 0, *size)) if window else None
    width, height = (max(1, round(side * factor)) for side in size)
    left, top = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
    return Move(size, (0, 0, *size), (left, top, left + width, top + height))


def draw_crop(size: Size, truth: Truth, rng: np.random.Generator, options: AugmentOptions) -> Move | None:
    """A window of another aspect ratio, enlarged to the whole frame."""
    if rng.random() >= options.crop:
        return None

    def shares() -> tuple[float, float]:
        wide = rng.uniform(options.crop_side, 1)
        high = rng.uniform(max(options.crop_side, wide / _ASPECT), min(1.0, wide * _ASPECT))
        return wide, high

    window = _window(size, truth, rng, shares)
    return Move(size, window, (0, 0, *size)) if window else None


def draw_flip(size: Size, truth: Truth, rng: np.random.Generator, options: AugmentOptions) -> Move | None:
    if rng.random() >= options.flip:
        return None
    return Move(size, (0, 0, *size), (0, 0, *size), mirrored=True)


Draw = Callable[[Size, Truth, np.random.Generator, AugmentOptions], Move | None]

MOVES: tuple[Draw, ...] = (draw_crop, draw_scale, draw_flip)
"""A crop enlarges: after a scale that shrinks, it would enlarge what has lost its detail."""


def recoloured(image: Image.Image, rng: np.random.Generator, options: AugmentOptions) -> Image.Image:
    """SSD's photometric distortion, with the ranges of torchvision's RandomPhotometricDistort."""
    for enhancer, reach in (
        (ImageEnhance.Brightness, 0.125),
        (ImageEnhance.Contrast, 0.5),
        (ImageEnhance.Color, 0.5),
    ):
        if rng.random() < options.colour:
            image = enhancer(image).enhance(rng.uniform(1 - reach, 1 + reach))
    if rng.random() < options.colour:
        turned = round(rng.uniform(-0.05, 0.05) * 256)
        hue, *others = image.convert("HSV").split()
        hue = hue.point([(value + turned) % 256 for value in range(256)])
        image = Image.merge("HSV", (hue, *others)).convert("RGB")
    return image


def _window(
    size: Size, truth: Truth, rng: np.random.Generator, shares: Callable[[], tuple[float, float]]
) -> tuple[float, float, float, float] | None:
    """A window anywhere in the image that keeps truth; None if none is found. shares: draws its width and
    height, as shares of the image's."""
    for _ in range(_TRIES):
        wide, high = (side * share for side, share in zip(size, shares(), strict=True))
        left, top = rng.uniform(0, size[0] - wide), rng.uniform(0, size[1] - high)
        window = (left, top, min(left + wide, size[0]), min(top + high, size[1]))
        if _shows(truth, window) if isinstance(truth, Segments) else _keeps(truth, window):
            return window
    return None


def _nearest(low: float, high: float, count: int) -> np.ndarray:
    """int64 [count]: the pixels whose middles are nearest, where `count` of them span low to high."""
    return np.floor(low + (np.arange(count) + 0.5) * ((high - low) / count)).astype(np.int64)


def _shows(segments: Segments, window: tuple[float, float, float, float]) -> bool:
    """Whether enough of a thing is seen, of any but a crowd if there are others; where there are no things, any
    truth at all. An image without segments may be cut anywhere."""
    if not len(segments):
        return True
    left, top, right, bottom = (math.ceil(edge - 0.5) for edge in window)  # pixels whose middles are inside
    inside = segments.masks[:, top:bottom, left:right]
    wanted = segments.thing & ~segments.crowd
    if not segments.thing.any():
        return bool(inside.any())
    wanted = wanted if wanted.any() else segments.thing
    seen, whole = (np.count_nonzero(masks[wanted], axis=(1, 2)) for masks in (inside, segments.masks))
    return bool((seen >= _VISIBLE * whole).any())


def _keeps(objects: Objects, window: tuple[float, float, float, float]) -> bool:
    """Whether the centre of an object is inside, of any but a crowd if there are others, and enough to be seen of
    all whose centre is. An image without objects may be cut anywhere."""
    if not len(objects):
        return True
    first, last = np.array(window[:2]), np.array(window[2:])
    boxes = objects.boxes.astype(np.float64)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((centres > first) & (centres < last)).all(1)
    wanted = kept if objects.crowd.all() else kept & ~objects.crowd
    seen = np.clip(np.minimum(boxes[:, 2:], last) - np.maximum(boxes[:, :2], first), 0, None).prod(1)
    shares = seen / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return bool(wanted.any() and (shares[kept] >= _VISIBLE).all())
