"""From a row to tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from fasttune.errors import DataError
from fasttune.models.language import IGNORED
from fasttune.models.tokenizer import check_ids
from fasttune.task import Sample
from fasttune_chat.build import Built
from fasttune_chat.messages import layout_of, read_messages, read_pair, read_tools
from fasttune_chat.options import ChatOptions
from fasttune_chat.rendering import Conversation, Span

_LONGEST_SHOWN = 4000  # characters


class Encoder:
    """Samples of rows in every layout. vocabulary: tokens that the model has embeddings for."""

    def __init__(self, tokenizer: Any, built: Built, options: ChatOptions, vocabulary: int):
        self.tokenizer, self.built, self.options, self.vocabulary = tokenizer, built, options, vocabulary

    def encode(self, row: Mapping[str, Any], *, train: bool, ask: bool) -> Sample | list[Sample]:
        """train: without what only a prediction needs. ask: a prediction alone is wanted. Raises DataError."""
        layout = layout_of(row)
        if layout == "text":
            return self._text(row["text"], train, ask)
        role = "messages" if layout == "messages" else "instruction"
        answered = not ask and (train or layout == "messages" or row.get("output") is not None)
        read = read_messages if layout == "messages" else read_pair
        try:
            turns, tools = read(row, answered=answered), read_tools(row)
            chat = Conversation(self.tokenizer, self.built.dialect, turns, tools)
            spans = chat.spoken(last=self.options.supervise == "last") if answered else []
            prompt = "" if train else chat.prompt()
        except DataError as error:
            if error.column == "messages":  # what is said of turns concerns the column that holds them here
                raise DataError(role, error.why) from error
            raise
        if not answered:
            return self._question(self._ids(prompt), is_text=False)
        ids, labels = self._labelled(chat.text, spans)
        longest = self.built.longest
        kept = slice(0, longest)
        if not (labels[1:longest] != IGNORED).any():
            raise DataError(
                role,
                f"nothing that is supervised is within {longest} tokens, the row has {len(ids)}; raise "
                "options.max_length",
            )
        cut = max(0, len(ids) - longest)
        tensors = _tensors(ids[kept], labels[kept])
        if not train:
            tensors |= self._prompt(self._ids(prompt), is_text=False)
        return Sample(tensors, cost=len(tensors["input_ids"]), truncated={role: cut})

    def _labelled(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and the same where a token holds a character of a span, else IGNORED."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = self._checked(found["input_ids"])
        places = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        said = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            said |= (places[:, 0] < end) & (places[:, 1] > start)
        if self.built.dialect.stop is None:
            # Nothing ends the turn: the end-of-text token does, right behind what is said last.
            behind = int(said.nonzero()[0].max(initial=-1)) + 1
            ids = np.append(ids[:behind], self.tokenizer.eos_token_id)
            said = np.append(said[:behind], True)
        if self.options.supervise == "all":
            said[:] = True
        return ids, np.where(said, ids, IGNORED)

    def _question(self, ids: np.ndarray, is_text: bool) -> Sample:
        """A sample that is to be answered or continued: nothing in it is supervised."""
        asked = self._prompt(ids, is_text)
        kept = asked["prompt_ids"]
        return Sample(_tensors(kept, np.full_like(kept, IGNORED)) | asked, cost=len(kept))

    def _text(self, text: str, train: bool, ask: bool) -> Sample | list[Sample]:
        """Pieces of a text. A piece begins with the last token of the one before: every token but the first is a
        target once."""
        begins = [] if self.built.begins is None else [self.built.begins]
        own = self._ids(text)
        if ask:
            return self._question(np.asarray([*begins, *own], dtype=np.int64), is_text=True)
        ends = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = np.asarray([*begins, *own, *ends], dtype=np.int64)
        if len(ids) < 2:
            raise DataError("text", f"the tokenizer makes {len(ids)} tokens of {text[:40]!r}: nothing to predict")
        samples = []
        longest = self.built.longest
        first_half = ids[: max(1, (min(len(ids), longest) - len(ends)) // 2)]
        for start in range(0, len(ids) - 1, longest - 1):
            piece = ids[start : start + longest]
            tensors = _tensors(piece, piece)
            if not train:
                tensors |= self._prompt(first_half if start == 0 else ids[:0], is_text=True)
            samples.append(Sample(tensors, cost=len(piece)))
        return samples

    def _prompt(self, ids: np.ndarray, is_text: bool) -> dict[str, np.ndarray]:
        """What is to be answered, with room for the answer: what is too much is cut off its beginning."""
        positions = self.built.positions
        room = len(ids) if positions is None else positions - new_tokens(positions, self.options)
        kept = ids[-room:] if room < len(ids) else ids
        return {
            "prompt_ids": kept,
            "prompt_mask": np.ones_like(kept),
            "prompt_cut": np.asarray(len(ids) - len(kept), dtype=np.int64),
            "prompt_is_text": np.asarray(is_text),
        }

    def _ids(self, text: str) -> np.ndarray:
        return self._checked(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _checked(self, found: list[int]) -> np.ndarray:
        ids = np.asarray(found, dtype=np.int64)
        check_ids(ids, self.tokenizer, self.vocabulary, None)
        return ids


def new_tokens(positions: int | None, options: ChatOptions) -> int:
    """Tokens of a reply at most: half of what the model can take is the prompt's."""
    return options.max_new_tokens if positions is None else max(1, min(options.max_new_tokens, positions // 2))


def _tensors(ids: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def marked(sample: Sample, tokenizer: Any) -> str:
    """A sample's text, what is supervised between « and »."""
    ids, labels = sample.tensors["input_ids"], sample.tensors["labels"]
    parts = []
    places = zip(ids.tolist(), (labels != IGNORED).tolist(), strict=True)
    for is_target, run in groupby(places, lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"«{text}»" if is_target else text)
    whole = "".join(parts)
    return whole if len(whole) <= _LONGEST_SHOWN else f"{whole[:_LONGEST_SHOWN]} …"
