"""transformers' own losses of segmentation, as a sum and the number of what is counted.

A model that gives each pixel a class is trained by cross-entropy: the sum over pixels with truth, and their
number. An auxiliary head adds its own, with transformers' weight.

A model that finds segments by queries (MaskFormer, Mask2Former, EoMT) matches them to the true ones, and counts
segments. transformers divides what it says of masks by their number in the batch: here it is the sum. Its class
loss is divided by its weights, 1 for a query that is matched and `no_object_weight` for the others. A sum that is
divided by the number of segments later can equal that for one number of segments an image only: by default, that
of train (`losses` says more: the same holds for DETR).

Mask2Former and EoMT look at masks at points that are drawn. In training torch's generator draws them, as for
transformers' Trainer. In eval mode every image has points of its own, always the same: its loss is the same
whatever stands beside it in the batch, and each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops import cross_entropy
from fasttune.task import Loss
from fasttune_detection.losses import COCO_BOXES_PER_IMAGE, class_factor

IGNORED = -100
"""The label of a pixel that is no truth."""

_SEED = 7


def pixel_loss(logits: Tensor, auxiliary: Tensor | None, weight: float, labels: Tensor) -> Loss:
    """logits, auxiliary: [N, classes, h, w] of any size. weight: of the auxiliary head. labels: int64 [N, H, W].
    Logits are enlarged to the labels' size, as transformers does it. parts: of the two heads, if there are two."""
    total = _summed(logits, labels)
    parts = {}
    if auxiliary is not None:
        beside = _summed(auxiliary, labels)
        parts = {"loss_decode": total.detach(), "loss_auxiliary": beside.detach()}
        total = total + weight * beside
    return Loss(total, float((labels != IGNORED).sum()), parts)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    large = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    rows = large.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])  # nothing else reads them
    loss = cross_entropy(rows, labels.reshape(-1), ignore_index=IGNORED, reduction="sum", inplace=True)
    assert isinstance(loss, Tensor)
    return loss


def sum_losses(model: Any, segments_per_image: float | None) -> None:
    """Makes `model(..., mask_labels=..., class_labels=...)` give its loss as a sum over segments, on this
    instance.

    segments_per_image: see above; None: the objects of COCO."""
    model.get_loss_dict = _Summed(model, segments_per_image or COCO_BOXES_PER_IMAGE)


class _Summed:
    """In the place of a model's `get_loss_dict`. parts: of the latest call, of its last layer alone, detached."""

    def __init__(self, model: Any, segments_per_image: float):
        self.model, self.segments_per_image = model, segments_per_image
        self.parts: dict[str, Tensor] = {}

    def __call__(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Sums over segments, in fp32, by the names of transformers' terms and with its weights; each is summed
        over the layers that predict. masks_queries_logits: [N, queries, h, w]. class_queries_logits: [N, queries,
        classes + 1]. mask_labels: of each image, float [segments, H, W]. class_labels: int64 [segments]."""
        device = masks_queries_logits.device
        last = {"masks_queries_logits": masks_queries_logits, "class_queries_logits": class_queries_logits}
        layers = [
            (layer["masks_queries_logits"].float(), layer["class_queries_logits"].float())
            for layer in (last, *(auxiliary_predictions or ()))
        ]
        with torch.autocast(device.type, enabled=False):  # its matrix products would round what is compared
            terms = [self._layer(masks, classes, mask_labels, class_labels) for masks, classes in layers]
        self.parts = {name: term.detach() for name, term in terms[0].items()}
        return {name: torch.stack([layer[name] for layer in terms]).sum() for name in terms[0]}

    def _layer(
        self, masks: Tensor, classes: Tensor, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if self.model.training:
            return self._terms(masks, classes, mask_labels, class_labels)
        images = []
        for i in range(len(masks)):
            with _the_same_points(masks.device):
                one = slice(i, i + 1)
                images.append(self._terms(masks[one], classes[one], mask_labels[one], class_labels[one]))
        return {name: torch.stack([image[name] for image in images]).sum() for name in images[0]}

    def _terms(
        self, masks: Tensor, classes: Tensor, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        criterion = self.model.criterion
        pairs = criterion.matcher(masks, classes, mask_labels, class_labels)
        terms = criterion.loss_masks(masks, mask_labels, pairs, 1) | criterion.loss_labels(
            classes, class_labels, pairs
        )
        images, queries = classes.shape[:2]
        matched = sum(len(found) for found, _ in pairs)
        factors = {**criterion.weight_dict}
        factors["loss_cross_entropy"] *= class_factor(
            images, queries, matched, criterion.eos_coef, self.segments_per_image
        )
        return {name: term * factors[name] for name, term in terms.items()}


@contextmanager
def _the_same_points(device: torch.device) -> Iterator[None]:
    """What is drawn inside is always the same, and leaves the generator as it was."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        (torch.cuda.manual_seed if on_gpu else torch.random.default_generator.manual_seed)(_SEED)
        yield
