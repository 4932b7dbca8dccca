"""Image processors without torchvision, and input sizes other than the pretrained one."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, ViTImageProcessorPil
from transformers.utils.import_utils import is_timm_available, is_torchvision_available

from fasttune.errors import ModelError
from fasttune.models.images import SETTINGS, load_image_processor
from fasttune.task import Source

_TIMM = "timm_wrapper"
_CROP = frozenset({"do_center_crop", "crop_size"})


def load_processor(source: Source, config: PreTrainedConfig, side: int | None) -> tuple[Any, tuple[str, ...]]:
    """The processor beside a model, on Pillow, and notes for the user.

    side: of the square it shall make, None for its own. All images come out of it with one size: a batch pads
    what differs, and padding would be seen as a black border. Raises ModelError if there is no processor, or if a
    package that it needs is not installed.
    """
    if config.model_type == _TIMM and not (is_timm_available() and is_torchvision_available()):
        raise ModelError(f"model {str(source)!r} is a timm model: install timm and torchvision to use it")
    if getattr(config, "num_channels", 3) not in (3, None):
        raise ModelError(f"model {str(source)!r} takes images of {config.num_channels} channels; RGB has 3")
    processor, notes = _load(source)
    if config.model_type == _TIMM:
        if side is not None:
            raise ModelError(f"model {str(source)!r} is a timm model, whose image size can't be changed")
        return processor, notes
    settings = processor.to_dict()
    size = settings.get("size") or {}
    if side is not None:
        return type(processor).from_dict(settings | _sized(settings, size, side)), notes
    if "shortest_edge" in size and "crop_pct" not in settings and not settings.get("do_center_crop"):
        side = size["shortest_edge"]
        square = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
        notes = (*notes, f"images are cropped to {side} x {side} at their centre, so that they share a batch")
        return type(processor).from_dict(settings | square), notes
    return processor, notes


def pixels(processor: Any, image: Any) -> np.ndarray:
    """float32 [3, height, width] of a PIL image in RGB."""
    kind = "pt" if type(processor).__name__ == "TimmWrapperImageProcessor" else "np"
    values = processor(images=image, return_tensors=kind)["pixel_values"][0]
    return np.ascontiguousarray(values, dtype=np.float32)


def fit_model(source: Source, model: Any, side: int) -> None:
    """Makes a model take square images of another size than it was pretrained on: a vision transformer's position
    embeddings are interpolated, and its configuration states the new size. Raises ModelError if it still can't."""
    for module in list(model.modules()):
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Parameter) and hasattr(module, "interpolate_pos_encoding"):
            _interpolate(model, module, table, side)
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, side, side, dtype=model.dtype))
    # Models check sizes with whatever error their authors liked.
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise ModelError(
            f"model {str(source)!r} can't take images of {side} x {side} (options.image_size): {error}"
        ) from error


def _load(source: Source) -> tuple[Any, tuple[str, ...]]:
    found = load_image_processor(source, {"size", "image_mean"})
    if not isinstance(found, dict):
        return found, ()
    kept = {name: found[name] for name in (SETTINGS | _CROP) & found.keys()}
    stated = found.get("image_processor_type", "its image processor")
    note = f"{stated} is not available here: images are resized and normalised by its settings alone"
    return ViTImageProcessorPil.from_dict(kept), (note,)


def _sized(settings: dict[str, Any], size: dict[str, Any], side: int) -> dict[str, Any]:
    """Settings that end in a square of this side; a margin that is cropped away keeps its share."""
    square = {"height": side, "width": side}
    if "crop_pct" in settings:
        return {"size": {"shortest_edge": side}, "do_resize": True}
    if not settings.get("do_center_crop"):
        return {"size": square, "do_resize": True}
    crop = settings.get("crop_size") or {}
    margin = max(1.0, (size.get("shortest_edge") or size.get("height", 0)) / (crop.get("height") or side))
    resized = round(side * margin)
    whole = {"shortest_edge": resized} if "shortest_edge" in size else {"height": resized, "width": resized}
    return {"size": whole, "do_resize": True, "crop_size": square}


def _interpolate(model: Any, module: Any, table: nn.Parameter, side: int) -> None:
    patches = module.patch_embeddings
    height, width = patches.patch_size if isinstance(patches.patch_size, Iterable) else (patches.patch_size,) * 2
    grid = (side // height) * (side // width)
    special = table.shape[1] - patches.num_patches
    like = torch.zeros(1, special + grid, table.shape[2], dtype=table.dtype)
    with torch.no_grad():
        module.position_embeddings = nn.Parameter(module.interpolate_pos_encoding(like, side, side).clone())
    for part in (module, patches):
        if hasattr(part, "image_size"):
            part.image_size = (side, side) if isinstance(part.image_size, Iterable) else side
    patches.num_patches = grid
    model.config.image_size = side
