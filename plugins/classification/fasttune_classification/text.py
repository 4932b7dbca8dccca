"""text-classification: one class, several classes or a number for a text or a pair of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttune.errors import DataError
from fasttune.task import Bundle, Column, Demo, Sample, Source, every_strategy
from fasttune_classification.classifier import LABEL_ALIASES, Classifier
from fasttune_classification.options import TextOptions

TEXT_ALIASES = (
    "sentence",
    "content",
    "body",
    "review",
    "review_text",
    "document",
    "comment",
    "comment_text",
    "message",
    "tweet",
    "utterance",
    "query",
    "title",
    "headline",
    "abstract",
    "description",
    "sentence1",
    "question1",
    "question",
    "premise",
    "text1",
    "text_a",
)
PAIR_ALIASES = (
    "sentence2",
    "question2",
    "hypothesis",
    "text2",
    "text_b",
)
TEXT_LABEL_ALIASES = (
    *LABEL_ALIASES,
    "intent",
    "sentiment",
    "emotion",
    "topic",
    "stars",
    "rating",
    "polarity",
    "label_text",
    "score",
    "similarity_score",
)

# The demo's settings. Tuned on two cores: all variants together stay under two minutes.
DEMO_TRAIN_PER_LABEL = 40
DEMO_VALID_PER_LABEL = 50
DEMO_SEED = 17
DEMO_TRAIN = {
    "from scratch": {"epochs": 6, "lr": 5e-4},
    "head": {"epochs": 30, "lr": 5e-3},
    "lora": {"epochs": 6, "lr": 2e-3},
    "full": {"epochs": 6, "lr": 5e-4},
}


class TextClassification(Classifier):
    """Any sequence-classification model of transformers, with the tokenizer that lies beside it."""

    Options = TextOptions
    input_columns = (
        Column("text", "text", TEXT_ALIASES),
        Column("text_pair", "text", PAIR_ALIASES, required=False),
    )
    label_aliases = TEXT_LABEL_ALIASES

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no text model with a tokenizer, ConfigError if max_length doesn't
        suit the model."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

        from fasttune.models import tokenizer as tokenizers
        from fasttune.models.checkpoint import load_config, require_family
        from fasttune_classification.build import build_model

        config = load_config(source)
        require_family(source, config, "text-classification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
        tokenizer = tokenizers.load_tokenizer(source)
        built = build_model(source, config, AutoModelForSequenceClassification, labels, self.options.problem)
        tokenizers.fit_tokenizer(source, tokenizer, built.model, self.options.max_length)
        padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        return Bundle(
            model=built.model,
            processor=tokenizer,
            head=built.head,
            blocks=built.blocks,
            lora_targets=built.lora_targets,
            padding=padding,
            notes=built.notes,
        )

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        """input_ids and the tokenizer's other outputs, int64 [tokens]; "labels" as `target` makes it.

        The longer text of a pair is cut first. Raises DataError("text", why) if nothing is left of a text, or if
        a token is not in the model's vocabulary.
        """
        import numpy as np

        from fasttune.models.tokenizer import check_ids, stated_vocabulary

        tokenizer = bundle.processor
        texts = [row["text"]] if row.get("text_pair") is None else [row["text"], row["text_pair"]]
        encoding = tokenizer(*texts, truncation=False, verbose=False)
        whole = len(encoding["input_ids"])
        if whole > tokenizer.model_max_length:
            encoding = tokenizer(*texts, truncation="longest_first", verbose=False)
        tensors = {name: np.asarray(ids, dtype=np.int64) for name, ids in encoding.items()}
        ids = tensors["input_ids"]
        if not ids.size:
            raise DataError("text", f"the tokenizer makes no token of {row['text'][:40]!r}")
        check_ids(ids, tokenizer, stated_vocabulary(bundle.model), "text")
        return Sample(tensors | self.target(row, bundle), cost=ids.size, truncated=whole - ids.size)

    @classmethod
    def demo(cls) -> Demo:
        """Which library does a docstring come from: text of the installed packages, and an encoder that was
        pretrained on such text."""
        from fasttune_classification.demo import docstrings

        train, valid = docstrings.split(DEMO_TRAIN_PER_LABEL, DEMO_VALID_PER_LABEL, DEMO_SEED)
        labels = [row["label"] for row in valid]
        majority = max(labels.count(label) for label in set(labels)) / len(labels)
        return Demo(
            title=f"Which of {len(set(labels))} Python libraries does this docstring come from?",
            model=str(Path(docstrings.__file__).parent / "encoder"),
            train=[dict(row) for row in train],
            valid=[dict(row) for row in valid],
            variants=every_strategy(DEMO_TRAIN),
            baselines={"majority class": majority},
        )
