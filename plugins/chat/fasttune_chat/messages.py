"""From rows in any of their layouts to conversations: lists of turns as chat templates read them.

Every fault becomes a DataError that names the column and the turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from fasttune.errors import DataError, nearest

Turn = dict[str, Any]
Layout = Literal["messages", "pair", "text"]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Roles of the messages layout and of ShareGPT's kin, and what templates call them."""

_CALLS = ("function_call", "tool_call")  # ShareGPT writes a call as a turn of its own, in JSON
_OPENING = ("system", "developer")


def layout_of(row: Mapping[str, Any]) -> Layout:
    """Which layout a row is in: the first of messages, instruction and output, text that it has a value for.

    Raises DataError if it has none.
    """
    if row.get("messages") is not None:
        return "messages"
    if row.get("instruction") is not None or row.get("input") or row.get("output") is not None:
        return "pair"
    if row.get("text") is not None:
        return "text"
    raise DataError(None, "the row holds neither messages, nor instruction and output, nor text: all are empty")


def read_messages(row: Mapping[str, Any], *, answered: bool) -> list[Turn]:
    """The turns of a row in the messages layout, behind the system prompt of its own column, if it has one.

    answered: the last turn must be the assistant's, and later ones are left out; else only a turn to be answered
    must be there. Raises DataError.
    """
    turns = [_turn(value, index) for index, value in enumerate(_listed("messages", row["messages"]))]
    _check_order(turns)
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if answered and not spoken:
        raise DataError("messages", f"none of its {len(turns)} turns is the assistant's: nothing to learn")
    if answered:
        turns = turns[: spoken[-1] + 1]
    lead = _system(row)
    if lead and turns[0]["role"] in _OPENING:
        raise DataError("system", "the conversation has a system turn of its own already")
    return [*lead, *turns]


def read_pair(row: Mapping[str, Any], *, answered: bool) -> list[Turn]:
    """The turns of a row that holds an instruction, perhaps with an input, and its output. Prompt and completion
    may be lists of turns. Raises DataError."""
    instruction, output = row.get("instruction"), row.get("output")
    if isinstance(instruction, list):
        answer = output if isinstance(output, list) else [{"role": "assistant", "content": output}]
        turns = [*instruction, *(answer if answered else [])]
        try:
            return read_messages({**row, "messages": turns}, answered=answered)
        except DataError as error:
            raise DataError("instruction" if error.column == "messages" else error.column, error.why) from None
    asked = [_words("instruction", instruction), _words("input", row.get("input"))]
    question = "\n\n".join(text for text in asked if text.strip())
    if not question:
        raise DataError("instruction", "expected text, found none")
    turns = [*_system(row), {"role": "user", "content": question}]
    if answered:
        reply = _words("output", output)
        if not reply.strip():
            raise DataError("output", "expected text, found none")
        turns.append({"role": "assistant", "content": reply})
    return turns


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that the conversation may call: JSON schemas. Raises DataError."""
    value = row.get("tools")
    if value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "[]")):
        return None
    tools = _listed("tools", value)
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not tool_name(tool):
            raise DataError("tools", f"tool {index + 1} (index {index}): expected an object with a name")
    return [_without_nulls(tool) for tool in tools]


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a tool or of a call, {"function": {"name"}} or {"name"}."""
    inner = tool.get("function")
    name = (inner if isinstance(inner, Mapping) else tool).get("name")
    return name if isinstance(name, str) and name else None


def place(index: int) -> str:
    """A turn as messages name it: counted from 1, as rows are, and its index in the list."""
    return f"turn {index + 1} (index {index})"


def unanswered(turns: list[Turn]) -> list[Turn]:
    """What a reply is asked for: the conversation before its last turn, if that is the assistant's."""
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def _listed(column: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(column, f"expected a list, found text that is no JSON: {value[:60]!r}") from None
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        # A list of objects, as `datasets` once kept it: an object of lists.
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise DataError(column, f"expected a list, found {type(value).__name__} {value!r:.60}")
    if not value:
        raise DataError(column, "the list is empty")
    return value


def _turn(value: Any, index: int) -> Turn:
    at = place(index)
    if not isinstance(value, Mapping):
        raise DataError("messages", f"{at}: expected an object with role and content, found {value!r:.60}")
    value = {key: part for key, part in value.items() if part is not None}
    said = value.pop("role", value.pop("from", None))
    if not isinstance(said, str) or said.strip().lower() not in ROLES:
        found = "no role" if said is None else f"role {said!r}"
        near = nearest(said, ROLES) if isinstance(said, str) else ""
        raise DataError("messages", f"{at}: {found} is not known.{near} Known: {', '.join(ROLES)}")
    said = said.strip().lower()
    role = ROLES[said]
    content = value.pop("content", value.pop("value", None))
    calls = value.pop("tool_calls", None)
    if said in _CALLS and content is not None:
        calls, content = _calls_in(content, at), None
    turn: Turn = {"role": role}
    if calls:
        if role != "assistant":
            raise DataError("messages", f"{at}: tool_calls in a turn of {said!r}; only the assistant calls tools")
        turn["tool_calls"] = _checked_calls(calls, at)
    text = None if content is None else _content(content, at)
    if text is None or not (text.strip() or role == "tool" or calls):
        if not calls:
            found = "no content" if text is None else "its content is empty"
            raise DataError("messages", f"{at}, {said}: {found}")
    else:
        turn["content"] = text
    return {**value, **turn}


def _content(value: Any, at: str) -> str:
    """Text, or parts of which each is text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in value}
        if kinds == {"text"} and all(isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
        found = ", ".join(sorted(map(str, kinds)))
        raise DataError("messages", f"{at}: expected parts of type text, found {found}")
    raise DataError("messages", f"{at}: expected text, found {type(value).__name__} {value!r:.60}")


def _calls_in(content: Any, at: str) -> list[Any]:
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise DataError("messages", f"{at}: expected a call as JSON with name and arguments: {error}") from None
    return found if isinstance(found, list) else [found]


def _checked_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Calls as templates read them: arguments as an object, where OpenAI's layout has JSON in a text."""
    if not isinstance(calls, list):
        raise DataError("messages", f"{at}: expected tool_calls to be a list, found {type(calls).__name__}")
    checked = []
    for call in calls:
        if not isinstance(call, Mapping) or not tool_name(call):
            raise DataError("messages", f"{at}: expected a call with a name and arguments, found {call!r:.60}")
        inner = dict(call["function"] if isinstance(call.get("function"), Mapping) else call)
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise DataError("messages", f"{at}: arguments of {inner['name']!r} are no JSON: {error}") from None
        function = {"name": inner["name"], "arguments": _without_nulls(arguments)}
        outer = {key: call[key] for key in ("id",) if call.get(key) is not None}
        checked.append({**outer, "type": "function", "function": function})
    return checked


def _check_order(turns: list[Turn]) -> None:
    """Raises DataError where a turn can't follow the one before it: [system] user assistant user assistant …, with
    tool turns behind the assistant's calls."""
    before = None
    for index, turn in enumerate(turns):
        role = turn["role"]
        allowed = {
            None: (*_OPENING, "user"),
            "system": ("user",),
            "developer": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }[before]
        if role not in allowed:
            where = f"after {before}" if before else "at the beginning"
            raise DataError(
                "messages",
                f"{place(index)}: wrong role order: {role} {where}; expected {' or '.join(allowed)}",
            )
        before = role
    if before in _OPENING:
        raise DataError("messages", f"{place(len(turns) - 1)}: nothing follows the turn of the {before}")


def _system(row: Mapping[str, Any]) -> list[Turn]:
    text = _words("system", row.get("system"))
    return [{"role": "system", "content": text}] if text.strip() else []


def _words(column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(column, f"expected text, found {type(value).__name__} {value!r:.60}")
    return value


def _without_nulls(value: Any) -> Any:
    """Without the keys that tables add: in one, all objects of a column have the keys of all, null where they had
    none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
