"""One forward pass of a detector: its loss, and its predictions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fasttune.task import Bundle, Loss

_DEFORMABLE = "deformable_detr"


def forward(model: Any, batch: Mapping[str, Tensor]) -> Any:
    """The model's outputs for a padded batch; with boxes, its loss too, as `losses` makes it a sum."""
    inputs = {name: batch[name] for name in ("pixel_values", "pixel_mask") if name in batch}
    with one_dtype(model):
        if "boxes" not in batch:
            return model(**inputs)
        labels = _labels(batch)
        outputs = model(**inputs, labels=labels)
        if model.config.model_type == _DEFORMABLE and model.config.two_stage:
            outputs.loss = outputs.loss + _loss_of_proposals(model, outputs, labels)
        return outputs


def loss_of(outputs: Any, batch: Mapping[str, Tensor]) -> Loss:
    return Loss(outputs.loss, float((batch["class_labels"] >= 0).sum()), dict(outputs.loss_dict))


def predictions_of(
    outputs: Any, batch: Mapping[str, Tensor], bundle: Bundle, threshold: float
) -> list[dict[str, Any]]:
    """What `ObjectDetection.decode` gives, by the processor's own post-processing, as a pipeline does it."""
    found = SimpleNamespace(logits=outputs.logits.float(), pred_boxes=outputs.pred_boxes.float())
    processor: Any = bundle.processor
    images = processor.post_process_object_detection(found, threshold=threshold, target_sizes=batch["size"])
    names: Any = bundle.model.config.id2label  # type: ignore[union-attr]
    predictions = []
    for image, (height, width) in zip(images, batch["size"].tolist(), strict=True):
        order = image["scores"].argsort(descending=True, stable=True)
        predictions.append(
            {
                "boxes": image["boxes"][order].tolist(),
                "labels": [names[i] for i in image["labels"][order].tolist()],
                "scores": image["scores"][order].tolist(),
                "size": [width, height],
            }
        )
    return predictions


def _loss_of_proposals(model: Any, outputs: Any, labels: list[dict[str, Tensor]]) -> Tensor:
    """Two-stage Deformable DETR picks its queries from the encoder's own boxes, by how likely they are of class 0,
    whatever they hold. The paper (arXiv 2010.04159) trains them as a detector with one class; transformers' loss
    leaves them out, and new class layers would pick at random."""
    config = copy.copy(model.config)
    config.auxiliary_loss = False
    boxes = outputs.enc_outputs_coord_logits.float().sigmoid()
    found = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    total, _, _ = model.loss_function(outputs.enc_outputs_class, found, boxes.device, boxes, config)
    return total


def _labels(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What transformers' models take: of each image its classes, and its boxes as centre, width and height in
    fractions of the image itself, without the padding."""
    labels = []
    for i, classes in enumerate(batch["class_labels"]):
        there = classes >= 0
        corners = batch["boxes"][i][there].float()
        centres = torch.cat([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], dim=1) / 2
        labels.append({"class_labels": classes[there], "boxes": centres / _sides(batch, i).to(centres)})
    return labels


def _sides(batch: Mapping[str, Tensor], index: int) -> Tensor:
    """[4]: width, height, width, height of an image in its batch."""
    if "pixel_mask" in batch:
        mask = batch["pixel_mask"][index]
        height, width = mask[:, 0].sum(), mask[0].sum()
    else:
        height, width = map(torch.tensor, batch["pixel_values"].shape[2:])
    return torch.stack([width, height, width, height])


def one_dtype(model: Any) -> AbstractContextManager[Any]:
    """These models mix fp32 into their activations (positions, reference points, denoising queries): where weights
    are bf16, matrix products must cast."""
    weight = next(model.parameters())
    if weight.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(weight.device.type, weight.dtype)
