"""The head's classes: which id each label gets, and whether the checkpoint's own head can stay."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

_GENERIC = re.compile(r"(?:label|class)?[_ -]?\d+", re.IGNORECASE)

PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""config.problem_type, by which transformers' pipelines choose softmax, sigmoid or nothing."""


@dataclass(frozen=True)
class HeadPlan:
    """names: the classes in the order of their ids. keep: whether the checkpoint's head, if it has one, stays.
    was: how many classes the checkpoint's configuration states."""

    names: tuple[str, ...]
    keep: bool
    was: int


def plan_head(config: PreTrainedConfig, labels: list[str], problem: str) -> HeadPlan:
    """Compares the labels of train with the classes that the checkpoint's configuration states.

    The same classes, in whatever order or letter case, keep the model's ids; generic names (LABEL_0, 1) of equal
    number take the labels in order; anything else means a new head. Regression has one output and no class.
    """
    stated = _stated(config.id2label)
    if problem == "regression":
        return HeadPlan(("LABEL_0",), keep=len(stated) == 1, was=len(stated))
    if set(stated) == set(labels) and len(stated) == len(labels):
        return HeadPlan(tuple(stated), keep=True, was=len(stated))
    by_folded = {label.casefold(): label for label in labels}
    if len(by_folded) == len(labels) == len(stated) and {name.casefold() for name in stated} == set(by_folded):
        return HeadPlan(tuple(by_folded[name.casefold()] for name in stated), keep=True, was=len(stated))
    generic = all(_GENERIC.fullmatch(name) for name in stated)
    return HeadPlan(tuple(labels), keep=generic and len(stated) == len(labels), was=len(stated))


def write_head(config: PreTrainedConfig, names: tuple[str, ...], problem: str) -> None:
    """States classes and problem type in the configuration, and in the text part of a composite one."""
    part: Any
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.num_labels = len(names)
        part.id2label = dict(enumerate(names))
        part.label2id = {name: i for i, name in enumerate(names)}
        part.problem_type = PROBLEM_TYPES[problem]


def _stated(id2label: Mapping[Any, Any] | None) -> list[str]:
    """Class names by id. Hub files have them as anything JSON can hold."""
    return [str(name) for _, name in sorted((id2label or {}).items())]
