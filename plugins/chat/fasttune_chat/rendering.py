"""Conversations to text by a chat template, and where in that text the assistant speaks.

What is supervised is found by position in the text, never by the ids of tokens. A template says it itself with
{% generation %}; any other is asked what it writes for the beginnings of the conversation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import jinja2

from fasttune.errors import DataError, ModelError
from fasttune_chat.messages import Turn, place, tool_name, unanswered

Span = tuple[int, int]
"""Characters of a rendered text: the first, and one behind the last."""

_MARK = "QxZfasttuneMarkZxQ"  # stands for a turn's text where only its place is wanted
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Turn] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _MARK}]
_FAULTS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Dialect:
    """What a chat template reads beside the conversation, and how it ends what the assistant says.

    closing: what it writes behind the assistant's last text: `end`, and a newline or the like.
    end: the closing up to its first special token, such as "<|im_end|>".
    stop: that token; None if the template writes none, so that the end-of-text token has to be added.
    """

    variables: dict[str, Any] = field(default_factory=dict)
    closing: str = ""
    end: str = ""
    stop: str | None = None


def learn_dialect(tokenizer: Any, variables: dict[str, Any]) -> Dialect:
    """Finds how the tokenizer's template closes the assistant's turn. Raises ModelError if it can't be used."""
    try:
        text = Conversation(tokenizer, Dialect(variables), _PROBE).text
    except DataError as error:
        raise ModelError(f"a question and its answer: {error.why}; choose options.template") from error
    if text.count(_MARK) != 1:
        raise ModelError(
            f"the chat template writes what the assistant says {text.count(_MARK)} times, not once; choose "
            "options.template"
        )
    closing = text.partition(_MARK)[2]
    stop = _leading_special(tokenizer, closing)
    end = closing[: closing.index(stop) + len(stop)] if stop else closing.rstrip()
    return Dialect(variables, closing, end, stop)


class Conversation:
    """A conversation as a tokenizer's template writes it.

    text: the whole. Every method raises DataError("messages", why) where the template refuses the conversation.
    """

    def __init__(self, tokenizer: Any, dialect: Dialect, turns: list[Turn], tools: list[Any] | None = None):
        self.tokenizer, self.dialect, self.turns, self.tools = tokenizer, dialect, turns, tools

    @cached_property
    def text(self) -> str:
        return self._render(self.turns)

    def prompt(self) -> str:
        """What the model reads before it writes the reply that is asked for, or was given."""
        asked = unanswered(self.turns)
        text = self._render(asked, prompt=True)
        self._check_nothing_is_left_out(text, asked)
        return text

    def spoken(self, *, last: bool = False) -> list[Span]:
        """The spans that the assistant says, each with its end-of-turn token. last: those of the last turn alone.

        Raises DataError if the template leaves a part of the conversation out, or if what it writes for a turn
        can't be told from the rest.
        """
        self._check_nothing_is_left_out(self.text, self.turns)
        indices = [index for index, turn in enumerate(self.turns) if turn["role"] == "assistant"]
        indices = indices[-1:] if last else indices
        if _GENERATION.search(self.tokenizer.get_chat_template(tools=self.tools)):
            spans = self._by_generation_blocks()
            if last:
                start = self._start(indices[0])
                spans = [span for span in spans if span[0] >= start]
            if spans:
                return spans
        return [(self._start(index), self._end(index)) for index in indices]

    def _render(self, turns: list[Turn], *, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=self.tools, tokenize=False, add_generation_prompt=prompt, **self.dialect.variables
            )
        except _FAULTS as error:
            why = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise DataError("messages", f"the chat template does not take this conversation: {why}") from error

    def _by_generation_blocks(self) -> list[Span]:
        """The template's {% generation %} blocks. Where one ends before the end-of-turn token, that is taken in:
        without it the model never learns to stop."""
        found = self.tokenizer.apply_chat_template(
            self.turns,
            tools=self.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
            **self.dialect.variables,
        )
        spans = []
        places = zip(found["assistant_masks"], found["offset_mapping"], strict=True)
        for said, run in groupby(places, key=lambda pair: pair[0]):
            if said:
                offsets = [offset for _, offset in run]
                start, end = offsets[0][0], offsets[-1][1]
                end += len(self.dialect.end) if self.text.startswith(self.dialect.end, end) else 0
                spans.append((start, end))
        return spans

    def _start(self, index: int) -> int:
        """Where a turn of the assistant begins: behind the prompt that asks for it, as a rule."""
        asked = self._render(self.turns[:index], prompt=True)
        if self.text.startswith(asked):
            return len(asked)
        around = self._around(index)
        if around is None:
            raise self._not_found(index)
        return around[0]

    def _end(self, index: int) -> int:
        """One behind the end-of-turn token of a turn of the assistant.

        As a rule the text begins with the conversation up to this turn, but for what closes a conversation. Where
        later turns change it (Qwen3 drops earlier thoughts), the place of this turn's text or of the next one's is
        looked for.
        """
        text, dialect = self.text, self.dialect
        through = text if index == len(self.turns) - 1 else self._render(self.turns[: index + 1])
        if dialect.closing and through.endswith(dialect.closing):
            ended = through[: len(through) - len(dialect.closing)] + dialect.end
            if text.startswith(ended):
                return len(ended)
        if text.startswith(through):
            return len(through.rstrip())
        around = self._around(index)
        if around is not None and (stop := _leading_special(self.tokenizer, text[around[1] :])):
            return text.index(stop, around[1]) + len(stop)
        following = self._around(index + 1)
        if following is not None and dialect.stop:
            at = text.rfind(dialect.stop, self._start(index), following[0])
            if at >= 0:
                return at + len(dialect.stop)
        raise self._not_found(index)

    def _around(self, index: int) -> Span | None:
        """The span of a turn's own text: a mark is written in its place, and what stands around it is compared."""
        turn = self.turns[index]
        if not turn.get("content") or turn.get("tool_calls"):
            return None
        marked = self._render([*self.turns[:index], {**turn, "content": _MARK}, *self.turns[index + 1 :]])
        before, mark, after = marked.partition(_MARK)
        if not mark or _MARK in after or not self.text.startswith(before):
            return None
        return (len(before), len(self.text) - len(after)) if self.text[len(before) :].endswith(after) else None

    def _check_nothing_is_left_out(self, text: str, turns: list[Turn]) -> None:
        """A template drops what it has no place for, without a word."""
        for index, turn in enumerate(turns):
            role, said = turn["role"], turn.get("content", "").strip()
            if role in ("system", "developer", "user") and said not in text:
                what = f"leaves out or changes what the turn of the {role} says"
            elif any((tool_name(call) or "") not in text for call in turn.get("tool_calls", ())):
                what = "has no place for tool_calls"
            else:
                continue
            raise DataError("messages", f"{place(index)}: the chat template {what}; choose options.template")
        if any((tool_name(tool) or "") not in text for tool in self.tools or ()):
            raise DataError("tools", "the chat template has no place for tools; choose options.template")

    @staticmethod
    def _not_found(index: int) -> DataError:
        return DataError(
            "messages",
            f"{place(index)}: the chat template writes it in another way once more turns follow, so that what the "
            "assistant says in it can't be told from the rest; choose options.template, or options.supervise=last",
        )


def _leading_special(tokenizer: Any, text: str) -> str | None:
    """The special token that a text begins with, blanks aside."""
    rest = text.lstrip()
    known = (token.content for token in tokenizer.added_tokens_decoder.values())
    fitting = [token for token in known if token.strip() and rest.startswith(token)]
    return max(fitting, key=len, default=None)
