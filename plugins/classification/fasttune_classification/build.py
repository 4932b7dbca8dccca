"""Loads a backbone with a head for the classes of train, and says where its parts are."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from fasttune.models import structure
from fasttune.models.checkpoint import quiet
from fasttune.models.loading import (
    Loaded,
    by_its_backbone,
    check_backbone,
    inside,
    pretrained,
    random_model,
    untrained,
)
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
    loaded = random_model(source, config, auto) if source.random_weights else pretrained(source, config, auto)
    model = loaded.model.eval()
    base = structure.base_name(model)
    blocks = structure.block_names(model, base)
    if any(inside(name, blocks) for name in loaded.missing):
        loaded = by_its_backbone(source, config, loaded, base)
    head = structure.head_modules(model, base)
    notes = []
    if source.random_weights:
        notes = ["random weights: nothing is pretrained", f"new head: {_outputs(plan, problem)}"]
    else:
        lacking = {name for name in loaded.missing if inside(name, [base]) and not inside(name, head)}
        check_backbone(source, loaded, base, blocks, lacking)
        notes.append(_settle_head(loaded, auto, plan, base, head, problem))
        modules, loose = untrained(model, lacking)
        head += modules
        if modules or loose:
            notes.append(f"not in the checkpoint, newly initialised: {', '.join([*modules, *loose])}")
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # a classifier never reads the keys and values that it would keep
    return Built(model, tuple(head), blocks, structure.linear_names(model, blocks, head), tuple(notes))


def _settle_head(loaded: Loaded, auto: Any, plan: HeadPlan, base: str, head: list[str], problem: str) -> str:
    """Starts the head anew where it means other classes than those of train. Returns what the user should know."""
    now = _outputs(plan, problem)
    outside = {name for name in loaded.missing if inside(name, head) or not inside(name, [base])}
    if outside - loaded.mismatched:
        return f"new head: {now}"
    if outside:
        return f"head replaced: {plan.was} {_noun(plan.was, problem)} became {len(plan.names)}"
    if plan.keep:
        return f"head kept: {now}"
    _restart(loaded.model, _sized_by_labels(loaded.model, auto))
    return f"head replaced: its {plan.was} {_noun(plan.was, problem)} are not the ones of train"


def _sized_by_labels(model: Any, auto: Any) -> list[str]:
    """Names of the parameters whose shape depends on the number of classes."""
    config = copy.deepcopy(model.config)
    config.num_labels = len(model.config.id2label) + 1
    with quiet(), torch.device("meta"):
        probe = auto.from_config(config, trust_remote_code=False)
    shapes = {name: parameter.shape for name, parameter in probe.named_parameters()}
    return [name for name, parameter in model.named_parameters() if shapes[name] != parameter.shape]


def _restart(model: Any, names: Iterable[str]) -> None:
    """Draws parameters anew: weights from a normal distribution, biases at zero, as transformers does."""
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=deviation)
        else:
            nn.init.zeros_(parameter)


def _outputs(plan: HeadPlan, problem: str) -> str:
    return f"{len(plan.names)} {_noun(len(plan.names), problem)}"


def _noun(count: int, problem: str) -> str:
    if problem == "regression":
        return "output" if count == 1 else "outputs"
    return "class" if count == 1 else "classes"
