"""What the three tasks share: options, loss, decoding, metrics. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fasttune.errors import DataError, nearest
from fasttune.task import Bundle, Column, Loss, Meter, Metric, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

TARGET = "labels"
"""The batch's supervising tensor; every other tensor is an input of the model."""

LABEL_ALIASES = (
    "labels",
    "class",
    "classes",
    "class_name",
    "category",
    "categories",
    "target",
    "targets",
    "tag",
    "tags",
    "y",
)

_METRICS = {
    "single": (
        Metric("accuracy", "max", primary=True),
        Metric("macro_f1", "max"),
        Metric("weighted_f1", "max"),
        Metric("mcc", "max"),
    ),
    "multi": (
        Metric("micro_f1", "max", primary=True),
        Metric("macro_f1", "max"),
        Metric("mAP", "max"),
    ),
    "regression": (
        Metric("mse", "min", primary=True),
        Metric("pearson", "max"),
        Metric("spearman", "max"),
    ),
}


class Classifier(Task):
    """Abstract: a task adds its Options, its input columns, `build` and `encode`."""

    input_columns: tuple[Column, ...] = ()
    label_aliases: tuple[str, ...] = LABEL_ALIASES

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]
        kinds = {"single": "label", "multi": "labels", "regression": "number"}
        label = Column("label", kinds[self.options.problem], self.label_aliases)  # type: ignore[arg-type]
        return (*self.input_columns, label)

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        return _METRICS[self.options.problem]

    def resolve(self, counts: Mapping[str, int]) -> Any:
        """The options with class weights written out as a weight for every class.

        Raises DataError("label", why) if train has too few classes, ConfigError if a weight names no class.
        """
        from fasttune_classification.options import class_weights

        problem = self.options.problem
        if problem == "regression":
            return self.options
        if problem == "single" and len(counts) < 2:
            found = f"only {next(iter(counts))!r}" if counts else "none"
            raise DataError("label", f"at least two classes are needed to learn from; train has {found}")
        if not counts:
            raise DataError("label", "train names no class in any row; at least one is needed")
        weights = class_weights(self.options.class_weights, dict(counts))
        return self.options.model_copy(update={"class_weights": weights})

    def target(self, row: Mapping[str, Any], bundle: Bundle) -> dict[str, np.ndarray]:
        """The supervising tensor of a row: int64 [] (single), float32 [classes] (multi), float32 [] (regression);
        empty if the row has no label. Raises DataError("label", why) for a class that the model lacks."""
        import numpy as np

        label = row.get("label")
        if label is None:
            return {}
        if self.options.problem == "regression":
            return {TARGET: np.asarray(label, dtype=np.float32)}
        config: Any = bundle.model.config
        ids: dict[str, int] = config.label2id
        if self.options.problem == "single":
            return {TARGET: np.asarray(_class_id(label, ids), dtype=np.int64)}
        hot = np.zeros(len(ids), dtype=np.float32)
        for name in label:
            hot[_class_id(name, ids)] = 1
        return {TARGET: hot}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """Cross-entropy (single), binary cross-entropy (multi) or squared error (regression), summed in fp32."""
        return self._loss(model, _logits(model, batch), batch)

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[Any]:
        """A prediction a row: {"label", "score", "scores"}, {"labels", "scores"} or {"value"}."""
        import torch

        with torch.no_grad():
            return self._predictions(_logits(model, batch), bundle)

    def score(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> tuple[Loss, list[Any]]:
        """Loss and predictions from one forward pass."""
        logits = _logits(model, batch)
        return self._loss(model, logits, batch), self._predictions(logits.detach(), bundle)

    def meter(self) -> Meter:
        from fasttune_classification import meters

        kinds: dict[str, Any] = {
            "single": meters.SingleLabel,
            "multi": meters.MultiLabel,
            "regression": meters.Regression,
        }
        return kinds[self.options.problem]()

    def _loss(self, model: nn.Module, logits: Tensor, batch: dict[str, Tensor]) -> Loss:
        from fasttune_classification import outputs

        target = batch[TARGET]
        if self.options.problem == "regression":
            return outputs.squared_error(logits, target)
        weight = None
        if self.options.class_weights is not None:
            names = tuple(_names(model.config))
            weight = outputs.class_weights(tuple(self.options.class_weights[n] for n in names), logits.device)
        apply = outputs.single_label if self.options.problem == "single" else outputs.multi_label
        return apply(logits, target, weight, self.options.label_smoothing)

    def _predictions(self, logits: Tensor, bundle: Bundle) -> list[Any]:
        from fasttune_classification import outputs

        if self.options.problem == "regression":
            return outputs.values(logits)
        names = _names(bundle.model.config)
        if self.options.problem == "single":
            return outputs.best_class(logits, names)
        return outputs.classes_above(logits, names, self.options.threshold)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[N, classes]; labels never reach the model, which would apply a loss of its own."""
    return model(**{name: tensor for name, tensor in batch.items() if name != TARGET}).logits


def _names(config: Any) -> list[str]:
    return [config.id2label[i] for i in range(len(config.id2label))]


def _class_id(name: str, ids: Mapping[str, int]) -> int:
    if name not in ids:
        raise DataError("label", f"{name!r} is not a class of the model.{nearest(name, ids)}")
    return ids[name]
