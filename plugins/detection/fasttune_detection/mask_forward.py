"""One forward pass of a segmenter: its loss, and its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from fasttune.task import Bundle, Loss
from fasttune_detection.families import POOL_ALL, UNIVERSAL
from fasttune_detection.forward import one_dtype
from fasttune_detection.mask_losses import pixel_loss
from fasttune_detection.options import SegmentationOptions
from fasttune_detection.segments import to_rle

_OUTPUTS = ("logits", "class_queries_logits", "masks_queries_logits")
_MASK_THRESHOLD = 0.5  # DETR's for panoptic segmentation, as are the next
_OVERLAP_THRESHOLD = 0.8  # of its mask that a segment must keep where others are more likely


def forward(model: Any, batch: Mapping[str, Tensor]) -> Any:
    """The model's outputs for a batch; with truth, of universal models their loss too, as `mask_losses` makes it a
    sum, of the others `auxiliary`, the logits of the auxiliary head, or None."""
    values = batch["pixel_values"]
    with one_dtype(model):
        if model.config.model_type in UNIVERSAL:
            return model(pixel_values=values, **_targets(batch))
        images = len(values)
        if images == 1 and _normalises_one_value(model):
            values = values.expand(2, -1, -1, -1)
        found: list[Tensor] = []
        head = getattr(model, "auxiliary_head", None)
        handle = head and head.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            logits = model(pixel_values=values).logits
        finally:
            if handle:
                handle.remove()
        return SimpleNamespace(logits=logits[:images], auxiliary=found[0][:images] if found else None)


def loss_of(model: Any, outputs: Any, batch: Mapping[str, Tensor]) -> Loss:
    if model.config.model_type in UNIVERSAL:
        count = float((batch["class_labels"] >= 0).sum())
        return Loss(outputs.loss, count, dict(model.get_loss_dict.parts))
    weight = getattr(model.config, "auxiliary_loss_weight", 0.0)
    return pixel_loss(outputs.logits, outputs.auxiliary, weight, batch["labels"])


def predictions_of(
    outputs: Any, batch: Mapping[str, Tensor], bundle: Bundle, options: SegmentationOptions, scored: bool
) -> list[dict[str, Any]]:
    """What `ImageSegmentation.decode` gives, by the processor's own post-processing, as a pipeline does it, one
    image after the other: masks of all queries or classes in an image's own size take much memory."""
    names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
    fields = [
        name for name in ("logits", "class_queries_logits", "masks_queries_logits") if hasattr(outputs, name)
    ]
    predictions = []
    for i, (height, width) in enumerate(batch["size"].tolist()):
        one = SimpleNamespace(**{name: getattr(outputs, name)[i : i + 1].float() for name in fields})
        if options.kind == "semantic":
            segments = _semantic(one, (height, width), bundle.processor, names)
        elif options.kind == "instance":
            threshold = 0.0 if scored else options.threshold
            segments = _instances(one, (height, width), bundle.processor, names, threshold)
        else:
            stuff = frozenset(options.stuff or ())
            segments = _panoptic(one, (height, width), bundle.processor, names, options.threshold, stuff)
        predictions.append({"size": [width, height], "segments": segments})
    return predictions


def _normalises_one_value(model: Any) -> bool:
    """Whether a batch norm would refuse a single image, "expected more than 1 value per channel": the last batch
    of an epoch may be one. The image then stands there twice, which leaves means and variances as they are."""
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return model.config.model_type in POOL_ALL and any(norm.training for norm in norms)


def _targets(batch: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """What universal models take: of each image its masks, float32, and its classes, without the padding."""
    if "class_labels" not in batch:
        return {}
    there = batch["class_labels"] >= 0
    return {
        "mask_labels": [masks[kept].float() for masks, kept in zip(batch["mask_labels"], there, strict=True)],
        "class_labels": [classes[kept] for classes, kept in zip(batch["class_labels"], there, strict=True)],
    }


def _semantic(outputs: Any, size: tuple[int, int], processor: Any, names: Any) -> list[dict[str, Any]]:
    """size: (height, width)."""
    (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
    classes = found.cpu().numpy()
    return [{"label": names[i], "mask": to_rle(classes == i)} for i in np.unique(classes).tolist()]


def _instances(
    outputs: Any, size: tuple[int, int], processor: Any, names: Any, threshold: float
) -> list[dict[str, Any]]:
    """The best first. The processor gives masks in the model's size; they are enlarged one by one, by the nearest
    neighbour, which is what it would do with all at once. It paints them on a picture that lies on the CPU."""
    outputs = SimpleNamespace(**{name: tensor.cpu() for name, tensor in vars(outputs).items()})
    (found,) = processor.post_process_instance_segmentation(outputs, threshold=threshold, return_binary_maps=True)
    infos = found["segments_info"]
    segments = []
    for info, mask in zip(infos, found["segmentation"] if infos else (), strict=True):
        large = nn.functional.interpolate(mask[None, None], size=size, mode="nearest")[0, 0] > 0
        kept = large.numpy()
        if kept.any():
            segments.append(
                {
                    "label": names[info["label_id"]],
                    "score": info["score"],
                    "mask": to_rle(kept),
                    "box": _box(kept),
                }
            )
    return sorted(segments, key=lambda segment: -segment["score"])


def _panoptic(
    outputs: Any,
    size: tuple[int, int],
    processor: Any,
    names: Any,
    threshold: float,
    stuff: frozenset[str],
) -> list[dict[str, Any]]:
    """Things, and stuff that is one segment a class, with the score of the best. Stuff is joined here:
    transformers 5.23 gives new segments the numbers of others after it has joined two."""
    (found,) = processor.post_process_panoptic_segmentation(
        outputs,
        threshold=threshold,
        mask_threshold=_MASK_THRESHOLD,
        overlap_mask_area_threshold=_OVERLAP_THRESHOLD,
        label_ids_to_fuse=set(),
        target_sizes=[size],
    )
    ids = found["segmentation"].cpu().numpy()
    masks: dict[tuple[str, int], np.ndarray] = {}
    scores: dict[tuple[str, int], float] = {}
    for info in found["segments_info"]:
        label = names[info["label_id"]]
        key = (label, -1 if label in stuff else info["id"])
        mask = ids == info["id"]
        masks[key] = masks[key] | mask if key in masks else mask
        scores[key] = max(scores.get(key, 0.0), info["score"])
    return [
        {"label": key[0], "score": scores[key], "mask": to_rle(mask)} for key, mask in masks.items() if mask.any()
    ]


def _box(mask: np.ndarray) -> list[float]:
    """xyxy, in pixels, around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
