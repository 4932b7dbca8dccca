"""transformers' own detection losses, as a sum over boxes and the number of boxes.

They are means: divided by the boxes of a batch, DETR's class loss by the sum of its weights in the batch.
Multiplied by what they were divided by, they are sums that don't depend on what else is in the batch, and total /
count over a batch is what transformers computes for it. Two terms need more than that:

- The cross-entropy of DETR, YOLOS and Table Transformer is divided by its weights, 1 for a query that is matched
  and `eos_coefficient` for the others: (1 - eos) n + eos Q N for n boxes, N images and Q queries. A sum that is
  divided by n later can equal that for one number of boxes an image only: by default, that of train. A batch with
  so many boxes an image has transformers' loss; in one with more, its class term weighs as if it had as many.
- D-FINE and DEIMv2 distil the last layer into those before: a mean over matched and others that no factor turns
  into a sum. Their loss is taken image by image; the other terms stay what they are in a batch. (DEIMv2 also
  divides the box terms by the pairs that any layer matched, if `use_dense_one_to_one`.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune.errors import ModelError
from fasttune_detection.families import LOSSES_BY_IMAGE, SIGMOID_LOSSES, SOFTMAX_LOSS

COCO_BOXES_PER_IMAGE = 7.3
"""train2017: 860,001 boxes in 118,287 images."""

_PARTS = ("loss_ce", "loss_vfl", "loss_mal", "loss_bbox", "loss_giou")


def sum_losses(model: Any, boxes_per_image: float | None) -> None:
    """Makes `model(..., labels=...)` give its loss as a sum over boxes, on this instance.

    boxes_per_image: see above; None: COCO's. Raises ModelError if transformers has no training loss for the model,
    or one that is not known here.
    """
    original = model.loss_function
    name = getattr(original, "__name__", type(original).__name__)
    if name not in {SOFTMAX_LOSS, *SIGMOID_LOSSES, *LOSSES_BY_IMAGE}:
        raise ModelError(f"{type(model).__name__} can't be trained: transformers has no detection loss for it")
    model.loss_function = _Summed(model, original, name, boxes_per_image or COCO_BOXES_PER_IMAGE)


class _Summed:
    """In the place of a model's `loss_function`."""

    def __init__(self, model: Any, original: Callable[..., Any], name: str, boxes_per_image: float):
        self.model, self.original, self.name = model, original, name
        self.boxes_per_image = boxes_per_image

    def __call__(
        self,
        logits: Tensor,
        labels: Sequence[Mapping[str, Tensor]],
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        *more: Any,
        **named: Any,
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """(total, terms, auxiliary outputs): total and terms are sums over boxes, in fp32; terms are the last
        layer's, as transformers names and weights them."""
        if getattr(config, "group_detr", 1) > 1 and not self.model.training:
            # The criterion is made anew for each batch, and so takes itself to be training, where there are
            # several groups of queries. The model in eval mode has one.
            config = copy.copy(config)
            config.group_detr = 1
        outputs = _to_fp32({"logits": logits, "pred_boxes": pred_boxes, "more": more, "named": named})
        if self.name not in LOSSES_BY_IMAGE:
            return self._sum(outputs, labels, device, config)
        images = [self._sum(_take(outputs, i), [label], device, config) for i, label in enumerate(labels)]
        terms = {name: torch.stack([image[1][name] for image in images]).sum() for name in images[0][1]}
        return torch.stack([image[0] for image in images]).sum(), terms, None

    def _sum(
        self, outputs: Mapping[str, Any], labels: Sequence[Mapping[str, Tensor]], device: Any, config: Any
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        logits = outputs["logits"]
        loss, terms, auxiliary = self.original(
            logits, labels, device, outputs["pred_boxes"], config, *outputs["more"], **outputs["named"]
        )
        boxes = [len(label["class_labels"]) for label in labels]
        groups = getattr(config, "group_detr", 1)
        divisor = max(sum(boxes) * groups, 1) / groups
        factors = dict.fromkeys(terms, divisor)
        total = loss * divisor
        if self.name == SOFTMAX_LOSS:
            images, queries = logits.shape[:2]
            matched = sum(min(count, queries) for count in boxes)
            weights = class_factor(images, queries, matched, config.eos_coefficient, self.boxes_per_image)
            classes = [name for name in terms if name.startswith("loss_ce")]  # of each layer, with weight 1
            total = total + sum(terms[name] for name in classes) * (weights - divisor)
            factors |= dict.fromkeys(classes, weights)
        parts = {name: terms[name].detach() * factors[name] for name in _PARTS if name in terms}
        return total, parts, auxiliary


def class_factor(images: int, queries: int, matched: int, eos: float, per_image: float) -> float:
    """What makes a sum of a mean that was divided by the weights of its queries, 1 if matched and else eos:
    divided by the number of objects it is that mean again, where images have `per_image` objects."""
    weights = matched + eos * (images * queries - matched)
    return weights / ((1 - eos) + eos * queries / per_image)


def _to_fp32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _to_fp32(part) for name, part in value.items()}
    return type(value)(map(_to_fp32, value)) if isinstance(value, (list, tuple)) else value


def _take(value: Any, index: int) -> Any:
    """The part of one image: of tensors [images, ...], and of what describes the denoising queries."""
    if isinstance(value, Tensor):
        return value[index : index + 1]
    if isinstance(value, Mapping):
        positions = {name: [value[name][index]] for name in ("dn_positive_idx",) if name in value}  # one an image
        return {name: _take(part, index) for name, part in value.items()} | positions
    return type(value)(_take(part, index) for part in value) if isinstance(value, (list, tuple)) else value
