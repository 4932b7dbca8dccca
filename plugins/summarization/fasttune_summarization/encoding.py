"""Rows to tokens, and samples back to text for a person."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasttune.errors import DataError
from fasttune.models.tokenizer import check_ids, stated_vocabulary
from fasttune.task import Sample
from fasttune_summarization.models import Layout, Writer

IGNORED = -100
_SHOWN = 240  # characters of a source


def encode_pair(source: str, target: str | None, roles: tuple[str, str], writer: Writer) -> Sample:
    """The tensors that `Rewriting.encode` describes. Raises DataError(role, why)."""
    layout, tokenizer, model = writer.layout, writer.processor, writer.model
    config: Any = model.config
    if config.is_encoder_decoder:
        ids, cut = _plain(tokenizer, layout.before + source, layout.max_source)
    else:
        ids, cut = _prompted(tokenizer, source, layout, roles[0])
    if len(ids) <= layout.fixed and not tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"]:
        raise DataError(roles[0], f"the tokenizer makes no token of {source[:40]!r}")
    vocabulary = _vocabulary(model)
    check_ids(ids, tokenizer, vocabulary, roles[0])
    truncated = {roles[0]: cut}
    labels: list[int] = []
    if target is not None:
        labels, truncated[roles[1]] = _target(tokenizer, target, layout, config.is_encoder_decoder, roles[1])
        check_ids(labels, tokenizer, vocabulary, roles[1])
    cost = len(ids) + len(labels)
    if not config.is_encoder_decoder and target is not None:
        ids, labels = ids + labels, [IGNORED] * len(ids) + labels
    tensors = {"input_ids": np.asarray(ids, dtype=np.int64), "attention_mask": np.ones(len(ids), dtype=np.int64)}
    if target is not None:
        tensors["labels"] = np.asarray(labels, dtype=np.int64)
    if config.model_type == "led":
        # Its first token attends to all others, and they to it (arXiv 2004.05150, section 6).
        tensors["global_attention_mask"] = (np.arange(len(ids)) == 0).astype(np.int64)
    return Sample(tensors, cost=cost, truncated=truncated)


def _plain(tokenizer: Any, text: str, most: int) -> tuple[list[int], int]:
    """Tokens, special ones included, and how many were cut off before the last special ones."""
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    whole = len(ids)
    if whole > most:
        ids = tokenizer(text, truncation=True, max_length=most, verbose=False)["input_ids"]
    return list(ids), whole - len(ids)


def _prompted(tokenizer: Any, text: str, layout: Layout, role: str) -> tuple[list[int], int]:
    """The prompt's tokens as those of one text, without an end; of the input inside, the last tokens are cut."""
    found = tokenizer(
        layout.before + text + layout.after,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        verbose=False,
    )
    ids, special = list(found["input_ids"]), found["special_tokens_mask"]
    while ids and special[len(ids) - 1]:
        ids.pop()
    excess = len(ids) - layout.max_source
    if excess <= 0:
        return ids, 0
    first, last = len(layout.before), len(layout.before) + len(text)
    spans = found["offset_mapping"][: len(ids)]
    own = [i for i, (start, stop) in enumerate(spans) if not special[i] and first <= start < stop <= last]
    if excess >= len(own):
        raise DataError(role, f"nothing of it is left within max_source_length {layout.max_source}")
    cut = set(own[-excess:])
    return [token for i, token in enumerate(ids) if i not in cut], excess


def _target(tokenizer: Any, text: str, layout: Layout, encodes: bool, role: str) -> tuple[list[int], int]:
    """What is to be written, its end included, and how many tokens were cut off before the end."""
    most = layout.max_target - layout.append_end
    if encodes:
        ids = list(tokenizer(text_target=text, truncation=False, verbose=False)["input_ids"])
        whole = len(ids)
        if whole > most:
            ids = list(tokenizer(text_target=text, truncation=True, max_length=most, verbose=False)["input_ids"])
    else:
        ids = _going_on(tokenizer, layout.after, layout.glue + text)
        whole = len(ids)
        ids = ids[:most]
    if len(ids) <= layout.marks:
        raise DataError(role, f"the tokenizer makes no token of {text[:40]!r}")
    return ids + [layout.end] * layout.append_end, whole - len(ids)


def _going_on(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of a text as they are behind another one. Alone, a SentencePiece tokenizer would put a blank
    before it."""
    head = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(before + text, add_special_tokens=False, verbose=False)["input_ids"]
    if head and whole[: len(head)] == head:
        return list(whole[len(head) :])
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _vocabulary(model: Any) -> int:
    """Tokens that the model both has rows for and says it has."""
    rows = model.get_input_embeddings().weight.shape[0]
    return min(stated_vocabulary(model) or rows, rows)


def show_pair(sample: Sample, writer: Writer) -> str:
    """What the model reads, and between ⟦ and ⟧ what the loss is taken of, special tokens included."""
    tokenizer, ids = writer.processor, sample.tensors["input_ids"]
    labels = sample.tensors.get("labels", np.asarray([], dtype=np.int64))
    if labels.size == ids.size and not writer.model.config.is_encoder_decoder:  # type: ignore[union-attr, operator]
        ids = ids[labels == IGNORED]
    read = tokenizer.decode(ids.tolist())
    if len(read) > _SHOWN:
        read = f"{read[: _SHOWN // 2]} … {read[-_SHOWN // 2 :]}"
    return f"reads {read!r}, writes ⟦{tokenizer.decode(labels[labels != IGNORED].tolist())}⟧"
