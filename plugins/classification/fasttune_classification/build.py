"""Loads a backbone with a head for the classes of train, and says where its parts are."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from fasttune.models.checkpoint import quiet
from fasttune.models.heads import Headed, open_headed, restart
from fasttune.task import Source
from fasttune_classification.head import HeadPlan, plan_head, write_head


@dataclass(frozen=True)
class Built:
    """A model with its head, and the names that `Bundle` wants."""

    model: Any
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    lora_targets: tuple[str, ...]
    notes: tuple[str, ...]


def build_model(source: Source, config: PreTrainedConfig, auto: Any, labels: list[str], problem: str) -> Built:
    """The model of an auto class with one output a label (one in all for regression).

    config: as loaded; classes and problem type are written into it. Raises ModelError if the checkpoint can't be
    opened or lacks weights of the backbone.
    """
    plan = plan_head(config, labels, problem)
    write_head(config, plan.names, problem)
    opened = open_headed(source, config, auto)
    if source.random_weights:
        notes = (*opened.notes, f"new head: {_outputs(plan, problem)}")
    else:
        notes = (_settle_head(opened, auto, plan, problem), *opened.notes)
    return Built(opened.model, opened.head, opened.blocks, opened.lora_targets, notes)


def _settle_head(opened: Headed, auto: Any, plan: HeadPlan, problem: str) -> str:
    """Starts the head anew where it means other classes than those of train. Returns what the user should know."""
    now = _outputs(plan, problem)
    if opened.missing - opened.mismatched:
        return f"new head: {now}"
    if opened.missing:
        return f"head replaced: {plan.was} {_noun(plan.was, problem)} became {len(plan.names)}"
    if plan.keep:
        return f"head kept: {now}"
    restart(opened.model, _sized_by_labels(opened.model, auto))
    return f"head replaced: its {plan.was} {_noun(plan.was, problem)} are not the ones of train"


def _sized_by_labels(model: Any, auto: Any) -> list[str]:
    """Names of the parameters whose shape depends on the number of classes."""
    config = copy.deepcopy(model.config)
    config.num_labels = len(model.config.id2label) + 1
    with quiet(), torch.device("meta"):
        probe = auto.from_config(config, trust_remote_code=False)
    shapes = {name: parameter.shape for name, parameter in probe.named_parameters()}
    return [name for name, parameter in model.named_parameters() if shapes[name] != parameter.shape]


def _outputs(plan: HeadPlan, problem: str) -> str:
    return f"{len(plan.names)} {_noun(len(plan.names), problem)}"


def _noun(count: int, problem: str) -> str:
    if problem == "regression":
        return "output" if count == 1 else "outputs"
    return "class" if count == 1 else "classes"
