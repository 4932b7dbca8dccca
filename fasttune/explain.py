"""From pydantic's ValidationError to a message for people: key, line, what was found, the nearest right key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fasttune.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], values: Any, where: str, node: Any) -> str:
    """A line a problem. model: what `values` were to become. where: the file, or what stands for it.

    node: the tree of YAML nodes, which knows the lines, or None.
    """
    lines = []
    for problem in error.errors():
        path = _key_path(problem["loc"], values)
        line = _line_of(node, path)
        at = f"{where}, line {line}" if line else where
        key = ".".join(map(str, path))
        lines.append(f"{at}: {key + ': ' if key else ''}{_reason(problem, model, path)}")
    return "\n".join(dict.fromkeys(lines))


def _key_path(loc: Sequence[Any], values: Any) -> list[Any]:
    """Pydantic's location without the names of union members, which are in no file."""
    path: list[Any] = []
    for index, part in enumerate(loc):
        if isinstance(values, Mapping) and (part in values or index == len(loc) - 1):
            values = values.get(part)
        elif isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(part)
    return path


def _line_of(node: Any, path: Sequence[Any]) -> int | None:
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(part)), None)
        else:
            found = None
        if found is None:
            return line
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _reason(problem: Any, model: type[BaseModel], path: Sequence[Any]) -> str:
    found = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_at(model, problem["loc"][:-1])
            return f"unknown key.{nearest(str(path[-1]), known)} Known here: {', '.join(known)}"
        case "missing":
            return "is missing"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            allowed = [name.strip("'") for name in problem["ctx"]["expected_tags"].split(", ")]
            return f"no kind {tag!r}.{nearest(tag, allowed)} Expected one of: {', '.join(allowed)}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{message}, found {found!r}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _keys_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys that are known at a place. loc: pydantic's, which names the chosen one of several alternatives."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        fields = [candidate.model_fields[part] for candidate in models if part in candidate.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(Union[field.annotation, None])]  # noqa: UP007
        else:
            models = [candidate for candidate in models if candidate.model_fields["kind"].default == part]
    return sorted({key for candidate in models for key in candidate.model_fields} - {"provenance"})
