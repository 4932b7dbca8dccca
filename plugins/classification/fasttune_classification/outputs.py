"""From logits [N, C] to losses and predictions. Arithmetic in fp32, whatever the type of the logits."""

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune.ops import cross_entropy
from fasttune.task import Loss


@lru_cache(maxsize=8)
def class_weights(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """[C] fp32, kept on the device: a copy every step would wait for the device every step."""
    with torch.inference_mode(False):  # made while evaluating, it must still serve a backward pass
        return torch.tensor(weights, dtype=torch.float32, device=device)


def single_label(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Loss:
    """Cross-entropy. target: int64 [N]; weight: fp32 [C] or None. total / count over all batches is
    `F.cross_entropy`'s mean: the count is the sum of the targets' weights."""
    total = cross_entropy(logits, target, weight=weight, label_smoothing=smoothing, reduction="sum")
    count = float(target.numel()) if weight is None else weight[target].sum()
    return Loss(cast(Tensor, total).float(), count)


def multi_label(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Loss:
    """Binary cross-entropy of every class. target: 0 or 1 [N, C]; weight: fp32 [C] or None. The count is N * C,
    or N * the sum of the weights. Smoothing moves both answers towards one half."""
    soft = target.float() * (1 - smoothing) + smoothing / 2
    total = F.binary_cross_entropy_with_logits(logits.float(), soft, weight=weight, reduction="sum")
    count = float(target.numel()) if weight is None else target.shape[0] * weight.sum()
    return Loss(total, count)


def squared_error(logits: Tensor, target: Tensor) -> Loss:
    """logits: [N, 1]; target: [N]; the count is N."""
    total = F.mse_loss(logits.float().squeeze(-1), target.float(), reduction="sum")
    return Loss(total, float(target.numel()))


def best_class(logits: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """The likeliest class of each row, with the softmax probabilities of all."""
    predictions = []
    for row in logits.float().softmax(-1).tolist():
        best = max(range(len(row)), key=row.__getitem__)
        predictions.append(
            {"label": names[best], "score": row[best], "scores": dict(zip(names, row, strict=True))}
        )
    return predictions


def classes_above(logits: Tensor, names: list[str], threshold: float) -> list[dict[str, Any]]:
    """The classes of each row whose sigmoid probability reaches the threshold, with the probabilities of all."""
    predictions = []
    for row in logits.float().sigmoid().tolist():
        scores = dict(zip(names, row, strict=True))
        predictions.append({"labels": [name for name, p in scores.items() if p >= threshold], "scores": scores})
    return predictions


def values(logits: Tensor) -> list[dict[str, float]]:
    """The number that each row's single output states."""
    return [{"value": value} for value in logits.float().squeeze(-1).tolist()]
