"""The task. Importing this module imports no torch; the model is in `fasttune_parity.model`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from fasttune.errors import DataError, ModelError
from fasttune.task import Bundle, Column, Loss, Metric, Sample, Source, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

TAGS = ("even", "odd")
IGNORED = -100
LONGEST = 15


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lowest_length: int = Field(1, ge=1, description="Shorter words bear no tag.")


class Accuracy:
    """Share of words that are tagged right."""

    def __init__(self) -> None:
        self.right = self.words = 0

    def update(self, prediction: list[str], reference: Mapping[str, Any]) -> None:
        self.right += sum(a == b for a, b in zip(prediction, reference["tags"], strict=True))
        self.words += len(prediction)

    def merge(self, other: Accuracy) -> None:
        self.right += other.right
        self.words += other.words

    def result(self) -> dict[str, Any]:
        return {"word_accuracy": self.right / max(1, self.words)}


class SentenceParity(Task):
    columns = (
        Column("words", "text", ("sentence",)),
        Column("tags", "json", ("parity",), target=True),
    )
    metrics = (Metric("word_accuracy", "max", primary=True),)
    Options = Options

    def build(self, source: Source, labels: list[str]) -> Bundle:
        from fasttune_parity.model import ParityModel

        if not (Path(source) / "parity.json").is_file():
            raise ModelError(f"model {str(source)!r} has no parity.json")
        model = ParityModel.from_pretrained(source, random_weights=source.random_weights)
        blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
        return Bundle(
            model=model,
            processor=None,
            head=("head",),
            blocks=blocks,
            lora_targets=tuple(f"{block}.linear" for block in blocks),
            padding={"lengths": 0, "tags": IGNORED},
        )

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        import numpy as np

        words = row["words"].split()
        lengths = np.asarray([min(len(word), LONGEST) for word in words], dtype=np.int64)
        tensors = {"lengths": lengths}
        tags = row.get("tags")
        if tags is not None:
            if not isinstance(tags, list) or len(tags) != len(words):
                raise DataError("tags", f"expected a list of {len(words)} tags, one a word, found {tags!r:.60}")
            for tag in tags:
                if tag not in TAGS:
                    raise DataError("tags", f"expected one of {', '.join(TAGS)}, found {tag!r}")
            tensors["tags"] = np.asarray([TAGS.index(tag) for tag in tags], dtype=np.int64)
        return Sample(tensors, cost=len(words))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        from fasttune.ops import cross_entropy

        target = batch["tags"].flatten()
        logits = model(batch["lengths"]).flatten(0, 1)
        total = cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
        return Loss(total, (target != IGNORED).sum())

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[list[str]]:
        best = model(batch["lengths"]).argmax(-1)
        words = (batch["lengths"] > 0).sum(dim=1).tolist()
        return [[TAGS[i] for i in row[:count]] for row, count in zip(best.tolist(), words, strict=True)]

    def meter(self) -> Accuracy:
        return Accuracy()
