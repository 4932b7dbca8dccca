"""A question and its context to windows that overlap, and the answer's place in each of them.

T: tokens of a window. A token's offsets are its characters in the context, [begin, end).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttune.errors import DataError
from fasttune_question_answering.answers import Answer

_SHOWN = 160  # characters of a window on either side of its answer


@dataclass(frozen=True)
class Window:
    """tensors: what the tokenizer makes for the model, int64 [T]. offsets: int64 [T, 2]; [0, 0] where a token
    shows nothing of the context. null: the position for "not here". begin, end: the characters that it covers."""

    tensors: dict[str, np.ndarray]
    offsets: np.ndarray
    null: int
    begin: int
    end: int

    def place(self, answer: Answer | None) -> tuple[int, int] | None:
        """The first and the last token of the answer; None where it isn't whole here."""
        if answer is None:
            return None
        # White space at its ends is in no token of most tokenizers.
        begin = answer.end - len(answer.text.lstrip())
        end = answer.start + len(answer.text.rstrip())
        if begin < self.begin or end > self.end:
            return None
        shows = self.offsets[:, 1] > self.offsets[:, 0]
        inside = np.flatnonzero(shows & (self.offsets[:, 1] > begin) & (self.offsets[:, 0] < end))
        return (int(inside[0]), int(inside[-1])) if inside.size else None


@dataclass(frozen=True)
class Cutter:
    """Cuts questions and contexts to windows.

    tokenizer: a fast one; its model_max_length is the windows' length, and its padding side tells whether the
        question stands on the left ("right") or on the right. stride: tokens that neighbours share; None: 128, at
        most half of a window. question: the most tokens of a question.
    """

    tokenizer: Any
    stride: int | None
    question: int

    def windows(self, question: str, context: str) -> tuple[list[Window], int]:
        """The windows, in order, and how many tokens of the question were cut off. Raises DataError(column, why)
        if nothing is left of the question or the context, or if they have no room."""
        question, cut = self._question(question)
        length = self.tokenizer.model_max_length
        room = length - self._beside(question)
        if room < 1:
            raise DataError(
                "question",
                f"it leaves no room for the context in windows of {length} tokens; raise options.max_length or "
                "lower options.max_question_length",
            )
        encoding = self.tokenizer(
            *self._pair(question, context),
            truncation="only_second" if self._question_first else "only_first",
            max_length=length,
            stride=self._shared(length, room),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        windows = list(self._cut(encoding, len(context)))
        if not any(window.offsets.any() for window in windows):
            raise DataError("context", f"the tokenizer makes no token of {context[:40]!r}")
        return windows, cut

    @property
    def _question_first(self) -> bool:
        return self.tokenizer.padding_side == "right"

    def _pair(self, question: str, context: str) -> tuple[str, str]:
        return (question, context) if self._question_first else (context, question)

    def _question(self, text: str) -> tuple[str, int]:
        """The question without what is too much of it, and how many tokens were cut off."""
        text = text.strip()
        offsets = self._offsets(text)
        if not offsets:
            raise DataError("question", f"the tokenizer makes no token of {text[:40]!r}")
        whole = len(offsets)
        while len(offsets) > self.question:  # what is left of a word may have more tokens than it had in it
            text = text[: min(offsets[self.question - 1][1], len(text) - 1)]
            offsets = self._offsets(text)
        if not offsets:
            raise DataError("question", f"nothing is left of it in options.max_question_length {self.question}")
        return text, whole - len(offsets)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoding["offset_mapping"]

    def _beside(self, question: str) -> int:
        """How many tokens of a window are not the context's. An empty context would get no separator."""
        parts = self.tokenizer(*self._pair(question, "a"), verbose=False).sequence_ids(0)
        return sum(part != int(self._question_first) for part in parts)

    def _shared(self, length: int, room: int) -> int:
        wanted = min(128, length // 2) if self.stride is None else self.stride
        return wanted if wanted < room else room // 2

    def _cut(self, encoding: Any, characters: int) -> Iterator[Window]:
        context = int(self._question_first)  # its number in the pair
        last = len(encoding["offset_mapping"]) - 1
        for number, offsets in enumerate(encoding["offset_mapping"]):
            inside = np.asarray([sequence == context for sequence in encoding.sequence_ids(number)])
            shown = np.where(inside[:, None], np.asarray(offsets, dtype=np.int64), 0)
            some = shown[shown[:, 1] > shown[:, 0]]
            tensors = {
                name: np.asarray(encoding[name][number], dtype=np.int64)
                for name in self.tokenizer.model_input_names
                if name in encoding
            }
            yield Window(
                tensors,
                shown,
                self._null(tensors["input_ids"]),
                begin=0 if number == 0 else int(some[:, 0].min(initial=characters)),
                end=characters if number == last else int(some[:, 1].max(initial=0)),
            )

    def _null(self, ids: np.ndarray) -> int:
        """The first classification or start token; else the first token, as in transformers' run_qa."""
        for token in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id):
            if token is not None and token in ids:
                return int(np.flatnonzero(ids == token)[0])
        return 0


def shown(tensors: Mapping[str, np.ndarray], tokenizer: Any) -> str:
    """A sample for people: the question, and the window's context with the answer in «…»."""
    ids, offsets = tensors["input_ids"], tensors["offsets"]
    inside = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    others = np.delete(ids, np.arange(inside[0], inside[-1] + 1)) if inside.size else ids
    question = _text(tokenizer, others)
    if not inside.size:
        return f"{question} | no context in this window"
    first, last = int(inside[0]), int(inside[-1]) + 1
    start, end = int(tensors["start_positions"]), int(tensors["end_positions"]) + 1
    if start == int(tensors["null_position"]):
        return f"{question} | {_short(_text(tokenizer, ids[first:last]))} | no answer here"
    before, after = _text(tokenizer, ids[first:start]), _text(tokenizer, ids[end:last])
    before = f"… {before[-_SHOWN:]}" if len(before) > _SHOWN else before
    return f"{question} | {before} «{_text(tokenizer, ids[start:end])}» {_short(after)}"


def _text(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
