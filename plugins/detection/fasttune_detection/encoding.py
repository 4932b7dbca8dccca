"""From a row to what the model sees of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasttune.errors import DataError, nearest
from fasttune.task import Bundle, Sample
from fasttune_detection.boxes import Objects, read_objects, resized
from fasttune_detection.families import HEED_PADDING
from fasttune_detection.image_processor import Pixels
from fasttune_detection.options import DetectionOptions


def encode(row: dict[str, Any], bundle: Bundle, options: DetectionOptions) -> Sample:
    """See `ObjectDetection.encode`. Raises DataError for boxes that can't be used."""
    image = row["image"]
    objects = row.get("objects")
    if "objects" in row and not isinstance(objects, Objects):  # `vary` has read them already
        objects = read_objects(objects, options.box_format, image.size)
    config: Any = bundle.model.config
    pixels = Pixels.of(bundle.processor)
    values = pixels(image)
    height, width = values.shape[1:]
    tensors = {"pixel_values": values, "size": np.array([image.height, image.width], dtype=np.int64)}
    if config.model_type in HEED_PADDING:
        tensors["pixel_mask"] = np.ones((height, width), dtype=bool)
    beyond = 0
    if objects is not None:
        objects = resized(objects.take(~objects.crowd), image.size, (width, height))
        tensors["boxes"] = objects.boxes
        tensors["class_labels"] = np.array(
            [_class_id(name, config.label2id) for name in objects.labels], dtype=np.int64
        )
        beyond = max(0, len(objects) - _queries(config))
    return Sample(tensors, cost=height * width, truncated={"objects": beyond}, sides=(height, width))


def _class_id(name: str, ids: dict[str, int]) -> int:
    if name not in ids:
        raise DataError("objects", f"{name!r} is not a class of the model.{nearest(name, ids)}")
    return ids[name]


def _queries(config: Any) -> int:
    return int(getattr(config, "num_queries", None) or config.num_detection_tokens)
