"""Loads a backbone with a head for the classes of train, and says where its parts are."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from fasttune.errors import ModelError
from fasttune.task import Source
from fasttune_classification import structure
from fasttune_classification.checkpoint import LOADING_ERRORS, load_arguments, quiet, trouble
from fasttune_classification.head import HeadPlan, plan_head, write_head

_MOST_MISSING = 0.2
"""Share of the backbone's values that a checkpoint may lack: an untrained pooler is less, another family more."""


@dataclass(frozen=True)
class Built:
    """A model with its head, and the names that `Bundle` wants."""

    model: Any
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    lora_targets: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Loaded:
    """missing: names in the state that the checkpoint lacks, or holds in another shape (`mismatched`)."""

    model: Any
    missing: frozenset[str]
    mismatched: frozenset[str]


def build_model(source: Source, config: PreTrainedConfig, auto: Any, labels: list[str], problem: str) -> Built:
    """The model of an auto class with one output a label (one in all for regression).

    config: as loaded; classes and problem type are written into it. Raises ModelError if the checkpoint can't be
    opened or lacks weights of the backbone.
    """
    plan = plan_head(config, labels, problem)
    write_head(config, plan.names, problem)
    loaded = _random(source, config, auto) if source.random_weights else _pretrained(source, config, auto)
    model = loaded.model.eval()
    base = structure.base_name(model)
    blocks = structure.block_names(model, base)
    if any(_inside(name, blocks) for name in loaded.missing):
        loaded = _by_its_backbone(source, config, loaded, base)
    head = structure.head_modules(model, base)
    notes = []
    if source.random_weights:
        notes = ["random weights: nothing is pretrained", f"new head: {_outputs(plan, problem)}"]
    else:
        lacking = {name for name in loaded.missing if _inside(name, [base]) and not _inside(name, head)}
        _check_backbone(source, loaded, base, blocks, lacking)
        notes.append(_settle_head(loaded, auto, plan, base, head, problem))
        modules, loose = _untrained(model, lacking)
        head += modules
        if modules or loose:
            notes.append(f"not in the checkpoint, newly initialised: {', '.join([*modules, *loose])}")
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # a classifier never reads the keys and values that it would keep
    return Built(model, tuple(head), blocks, structure.linear_names(model, blocks, head), tuple(notes))


def _random(source: Source, config: PreTrainedConfig, auto: Any) -> _Loaded:
    arguments = load_arguments(source)
    revision = arguments.pop("revision", None)
    if revision:
        arguments["code_revision"] = revision
    try:
        with quiet():
            model = auto.from_config(config, dtype=torch.float32, **arguments)
    except LOADING_ERRORS as error:
        raise trouble(source, "a model of its configuration", error) from error
    return _Loaded(model, frozenset(), frozenset())


def _pretrained(source: Source, config: PreTrainedConfig, auto: Any) -> _Loaded:
    try:
        with quiet():
            model, report = auto.from_pretrained(
                source,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **load_arguments(source, weights=True),
            )
    except LOADING_ERRORS as error:
        raise trouble(source, "its weights", error) from error
    mismatched = frozenset(entry[0] for entry in report["mismatched_keys"])
    return _Loaded(model, mismatched | frozenset(report["missing_keys"]), mismatched)


def _by_its_backbone(source: Source, config: PreTrainedConfig, loaded: _Loaded, base: str) -> _Loaded:
    """A checkpoint that holds the bare backbone, read as such: transformers 5.13 renames the layers of a ViT only
    then, and would start them anew under a head."""
    try:
        with quiet():
            bare, report = AutoModel.from_pretrained(
                source, config=config, output_loading_info=True, **load_arguments(source, weights=True)
            )
    except LOADING_ERRORS:
        return loaded  # `_check_backbone` names what is missing
    backbone = loaded.model.get_submodule(base)
    if type(bare) is not type(backbone):
        return loaded
    read = {name: value for name, value in bare.state_dict().items() if name not in report["missing_keys"]}
    backbone.load_state_dict(read, strict=False)
    filled = {f"{base}.{name}" for name in read}
    return replace(loaded, missing=loaded.missing - filled, mismatched=loaded.mismatched - filled)


def _check_backbone(
    source: Source, loaded: _Loaded, base: str, blocks: tuple[str, ...], lacking: set[str]
) -> None:
    """Raises ModelError if the checkpoint is of another family than its configuration says, or was cut."""
    state = {name: value for name, value in loaded.model.state_dict().items() if _inside(name, [base])}
    lacking = lacking & state.keys()
    where = f"model {str(source)!r}: its weights don't fit its configuration ({loaded.model.config.model_type})"
    if reshaped := sorted(lacking & loaded.mismatched):
        raise ModelError(f"{where}: {reshaped[0]} has another shape, and {len(reshaped) - 1} more differ")
    parameters = {name for name, _ in loaded.model.named_parameters()}
    in_blocks = any(name in parameters and _inside(name, blocks) for name in lacking)
    values = sum(state[name].numel() for name in lacking)
    if in_blocks or values > _MOST_MISSING * sum(value.numel() for value in state.values()):
        raise ModelError(
            f"{where}: {len(lacking)} of the backbone's {len(state)} tensors are not in the checkpoint, such as "
            f"{min(lacking)}. The folder may mix files of two models, or the weights may be incomplete."
        )


def _settle_head(loaded: _Loaded, auto: Any, plan: HeadPlan, base: str, head: list[str], problem: str) -> str:
    """Starts the head anew where it means other classes than those of train. Returns what the user should know."""
    now = _outputs(plan, problem)
    outside = {name for name in loaded.missing if _inside(name, head) or not _inside(name, [base])}
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


def _untrained(model: nn.Module, lacking: set[str]) -> tuple[list[str], list[str]]:
    """Modules of the backbone that are new as a whole, and new parameters that stand beside pretrained ones."""
    parents = sorted({name.rpartition(".")[0] for name in lacking & {n for n, _ in model.named_parameters()}})
    whole = [
        parent
        for parent in parents
        if all(f"{parent}.{name}" in lacking for name, _ in model.get_submodule(parent).named_parameters())
    ]
    loose = sorted(name for name, _ in model.named_parameters() if name in lacking and not _inside(name, whole))
    return whole, loose


def _outputs(plan: HeadPlan, problem: str) -> str:
    return f"{len(plan.names)} {_noun(len(plan.names), problem)}"


def _noun(count: int, problem: str) -> str:
    if problem == "regression":
        return "output" if count == 1 else "outputs"
    return "class" if count == 1 else "classes"


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
