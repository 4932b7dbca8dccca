"""From a row to what a segmenter sees of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasttune.errors import DataError, nearest
from fasttune.task import Bundle, Sample
from fasttune_detection.families import UNIVERSAL
from fasttune_detection.image_processor import Pixels
from fasttune_detection.mask_losses import IGNORED
from fasttune_detection.options import SegmentationOptions
from fasttune_detection.segments import Segments, read_segments


def encode(row: dict[str, Any], bundle: Bundle, options: SegmentationOptions) -> Sample:
    """See `ImageSegmentation.encode`. Raises DataError for truth that can't be used."""
    image = row["image"]
    config: Any = bundle.model.config
    values = Pixels.of(bundle.processor)(image)
    height, width = values.shape[1:]
    tensors = {"pixel_values": values, "size": np.array([image.height, image.width], dtype=np.int64)}
    lost = 0
    role = "objects" if row.get("objects") is not None else "mask"
    if row.get(role) is not None:
        segments = read_segments(row, image.size, options.reading)
        segments = segments.take(~segments.crowd)
        ids = [_class_id(name, config.label2id, role) for name in segments.labels]
        masks = resized(segments, (height, width))
        if config.model_type in UNIVERSAL:
            seen = masks.any((1, 2))
            tensors["mask_labels"] = masks[seen]
            tensors["class_labels"] = np.array(ids, dtype=np.int64)[seen]
            lost = max(0, len(segments) - min(int(seen.sum()), _queries(config)))
        else:
            tensors["labels"] = _painted(masks, ids)
    return Sample(tensors, cost=height * width, truncated={role: lost}, sides=(height, width))


def resized(segments: Segments, size: tuple[int, int]) -> np.ndarray:
    """The masks, bool [n, height, width], by the nearest neighbour, as Pillow takes it. size: (height, width)."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
        for new, old in zip(size, segments.void.shape, strict=True)
    )
    return np.ascontiguousarray(segments.masks[:, rows][:, :, columns])


def _painted(masks: np.ndarray, ids: list[int]) -> np.ndarray:
    """int64 [h, w]: the class of each pixel; IGNORED where no mask is."""
    labels = np.full(masks.shape[1:], IGNORED, dtype=np.int64)
    for mask, number in zip(masks, ids, strict=True):
        labels[mask] = number
    return labels


def _queries(config: Any) -> int:
    return int(getattr(config, "decoder_config", config).num_queries)  # MaskFormer's are its decoder's


def _class_id(name: str, ids: dict[str, int], role: str) -> int:
    if name not in ids:
        raise DataError(role, f"{name!r} is not a class of the model.{nearest(name, ids)}")
    return ids[name]
