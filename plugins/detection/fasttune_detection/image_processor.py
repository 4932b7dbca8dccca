"""Image processors without torchvision: which one, to which size, and the same numbers faster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import transformers
from PIL import Image
from transformers import PreTrainedConfig
from transformers.image_transforms import get_size_with_aspect_ratio

from fasttune.errors import ConfigError, ModelError
from fasttune.models.images import PROCESSOR_FILE, SETTINGS, load_image_processor
from fasttune.task import Source

_STRIDE = 32  # of the coarsest features that these models read: other sizes are padded inside the model
_FINE = 8  # pixels; a smaller patch is merged with others later, up to that stride
_FLIP = "do_flip_channel_order"  # MobileViT was trained on blue, green, red


class Sizes(Protocol):
    """What options say of sizes: `size` as the user wants it, the others the medians of train's images."""

    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def image_size(self) -> tuple[int, int] | None: ...
    @property
    def edges(self) -> tuple[int, int] | None: ...


def processor_of(source: Source, config: PreTrainedConfig, known: Mapping[str, str]) -> str:
    """The name of the processor's class, by model type. Raises ModelError for a type that is not known here."""
    kind = known.get(config.model_type)
    if kind is None:
        raise ModelError(
            f"model {str(source)!r} is of type {config.model_type!r}, which can't be trained: transformers has no "
            f"loss for it, or fasttune doesn't know how to read it. Known: {', '.join(known)}"
        )
    return kind


def load_processor(
    source: Source,
    config: PreTrainedConfig,
    kind: str,
    options: Sizes,
    *,
    heeds_padding: bool = False,
    fixed: tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The processor on Pillow, its size as the options or train's images want it, and notes for the user.

    kind: its class. heeds_padding: images keep their shape. fixed: (height, width), the one size that the model
    can take. settings: what else the processor is to be told, where its class knows of it.
    Raises ModelError if the checkpoint's own can't be read, ConfigError for a size that the model can't take.
    """
    found, notes = _settings(source, kind)
    found["do_resize"] = True
    found["do_pad"] = heeds_padding
    found |= {name: value for name, value in (settings or {}).items() if name in found}
    stated = found["size"]
    if fixed is not None:
        stated, why = dict(zip(("height", "width"), fixed, strict=True)), "the one that the model takes"
        if options.size not in (None, fixed):
            raise ConfigError(
                f"options.size: {[*options.size]}: this model takes one size, {[*fixed]} (height, width)"  # type: ignore[misc]
            )
        size = stated
    elif heeds_padding:
        size, why = _edges(stated, options)
    else:
        size, why = _sides(stated, options, multiple_of(config))
    if heeds_padding:
        now = "shortest edge {shortest_edge}, longest at most {longest_edge}".format(**size)
    else:
        now = "{height} x {width} (height x width), whatever their shape".format(**size)
    found.pop("pad_size", None)
    cost = _pixels(stated, options) / _pixels(size, options)
    saved = ""
    if cost > 1.05 and not why.startswith("the checkpoint"):
        saved = f"; the checkpoint's own size would cost {cost:.1f} times the pixels"
    elif cost < 0.95:
        saved = f"; that costs {1 / cost:.1f} times the pixels of the checkpoint's own size"
    found["size"] = size
    return getattr(transformers, kind).from_dict(found), (*notes, f"images: {now}: {why}{saved}")


def _settings(source: Source, kind: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Those of the checkpoint's processor, in the words of the class that is used here."""
    default = getattr(transformers, kind)().to_dict()
    if not Path(source, PROCESSOR_FILE).is_file() and Path(source).is_dir():
        return default, (
            f"no {PROCESSOR_FILE}: images are normalised as {default['image_processor_type']} does it",
        )
    found = load_image_processor(source, {"size"})
    own = found if isinstance(found, dict) else found.to_dict()
    size = own.get("size") or default["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": own.get("max_size") or size * 1333 // 800}
    known = SETTINGS | (default.keys() & {_FLIP})
    return default | {name: own[name] for name in known & own.keys()} | {"size": dict(size)}, ()


def _edges(stated: dict[str, Any], options: Sizes) -> tuple[dict[str, int], str]:
    """{"shortest_edge", "longest_edge"}, and where they come from."""
    if options.size is not None:
        return dict(zip(("shortest_edge", "longest_edge"), sorted(options.size), strict=True)), "options.size"
    if "height" in stated:
        shortest, longest = sorted((stated["height"], stated["width"]))
    else:
        shortest = stated["shortest_edge"]
        longest = stated.get("longest_edge") or shortest * 1333 // 800
    if options.edges is None or (shortest, longest) <= options.edges:
        return {"shortest_edge": shortest, "longest_edge": longest}, "the checkpoint's own"
    least = min(shortest, options.edges[0])
    return {"shortest_edge": least, "longest_edge": max(least, min(longest, options.edges[1]))}, "train's median"


def _sides(stated: dict[str, Any], options: Sizes, multiple: int) -> tuple[dict[str, int], str]:
    """{"height", "width"}, and where they come from."""
    if options.size is not None:
        height, width = options.size
        if height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in options.size]
            raise ConfigError(
                f"options.size: {[*options.size]}: this model takes multiples of {multiple}, such as {near}"
            )
        return {"height": height, "width": width}, "options.size"
    why = "the checkpoint's own"
    if "height" in stated:
        height, width = stated["height"], stated["width"]
        wide, high = options.image_size or (width, height)
        if high < height or wide < width:
            height, width, why = min(height, high), min(width, wide), "train's median"
    elif options.image_size is None:
        height = width = stated["shortest_edge"]
    else:  # the checkpoint keeps each image's shape, which pads a batch: here all have that of the median
        wide, high = options.image_size
        factor = _factor(stated, *sorted((wide, high)))
        height, width, why = round(high * factor), round(wide * factor), "train's median shape"
    sides = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    return {"height": sides[0], "width": sides[1]}, why


def multiple_of(config: PreTrainedConfig) -> int:
    """What height and width must be multiples of."""
    backbone: Any = getattr(config, "backbone_config", None) or config
    patch: Any = getattr(backbone, "patch_size", None) or 1
    patch = max(patch) if isinstance(patch, (list, tuple)) else patch
    if patch < _FINE:
        return _STRIDE
    windows: Any = getattr(backbone, "num_windows_side", None) or getattr(backbone, "num_windows", 1)
    return int(windows * patch)


def _pixels(size: dict[str, Any], options: Sizes) -> float:
    """Of a resized image of train's median size."""
    if "height" in size:
        return float(size["height"] * size["width"])
    shortest, longest = options.edges or (3, 4)
    return _factor(size, shortest, longest, most=math.inf) ** 2 * shortest * longest


def _factor(size: dict[str, Any], shortest: int, longest: int, most: float = 1.0) -> float:
    """By which an image with these edges is resized, at most."""
    return min(most, size["shortest_edge"] / shortest, (size.get("longest_edge") or math.inf) / longest)


@dataclass(frozen=True)
class Pixels:
    """Makes what a processor makes of an image: resized, normalised.

    table: float32 [3, 256], the normalised value of each of the 256 that a channel can have. channels: of the
    image, red, green and blue, in the order that the model wants.
    """

    size: dict[str, int]
    resample: Any
    table: np.ndarray
    channels: tuple[int, int, int] = (0, 1, 2)

    @classmethod
    def of(cls, processor: Any) -> Pixels:
        settings = processor.to_dict()
        values = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (3, 256, 1))
        if settings["do_rescale"]:
            values = processor.rescale(values, settings["rescale_factor"])
        if settings.get("do_normalize"):  # MobileViT's has no such setting
            values = processor.normalize(values, settings["image_mean"], settings["image_std"])
        order = (2, 1, 0) if settings.get(_FLIP) else (0, 1, 2)
        return cls(dict(settings["size"]), settings["resample"], values[..., 0].astype(np.float32), order)

    def target(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that an image of this (width, height) is resized to."""
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        width, height = size
        high, wide = get_size_with_aspect_ratio(
            (height, width), self.size["shortest_edge"], self.size["longest_edge"]
        )
        return max(1, wide), max(1, high)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 [3, height, width] of an image in RGB."""
        values = np.asarray(image.resize(self.target(image.size), resample=self.resample))
        out = np.empty((3, *values.shape[:2]), dtype=np.float32)
        for place, channel in enumerate(self.channels):
            np.take(self.table[place], values[..., channel], out=out[place], mode="clip")
        return out
