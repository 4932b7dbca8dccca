"""A pretrained model of an auto class, with what its checkpoint lacked."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from fasttune.errors import ModelError
from fasttune.models.checkpoint import LOADING_ERRORS, load_arguments, quiet, trouble
from fasttune.task import Source

_MOST_MISSING = 0.2
"""Share of the backbone's values that a checkpoint may lack: an untrained pooler is less, another family more."""


@dataclass(frozen=True)
class Loaded:
    """missing: names in the state that the checkpoint lacks, or holds in another shape (`mismatched`)."""

    model: Any
    missing: frozenset[str]
    mismatched: frozenset[str]


def random_model(source: Source, config: PreTrainedConfig, auto: Any) -> Loaded:
    """A model of the configuration, its weights drawn from torch's generator. Raises ModelError."""
    arguments = load_arguments(source)
    revision = arguments.pop("revision", None)
    if revision:
        arguments["code_revision"] = revision
    try:
        with quiet():
            model = auto.from_config(config, dtype=torch.float32, **arguments)
    except LOADING_ERRORS as error:
        raise trouble(source, "a model of its configuration", error) from error
    return Loaded(model, frozenset(), frozenset())


def pretrained(source: Source, config: PreTrainedConfig, auto: Any) -> Loaded:
    """The model that lies there; weights that it lacks are drawn anew. Raises ModelError."""
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
    return Loaded(model, mismatched | frozenset(report["missing_keys"]), mismatched)


def by_its_backbone(source: Source, config: PreTrainedConfig, loaded: Loaded, base: str) -> Loaded:
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


def check_backbone(source: Source, loaded: Loaded, base: str, blocks: tuple[str, ...], lacking: set[str]) -> None:
    """Raises ModelError if the checkpoint is of another family than its configuration says, or was cut."""
    state = {name: value for name, value in loaded.model.state_dict().items() if inside(name, [base])}
    lacking = lacking & state.keys()
    where = f"model {str(source)!r}: its weights don't fit its configuration ({loaded.model.config.model_type})"
    if reshaped := sorted(lacking & loaded.mismatched):
        raise ModelError(f"{where}: {reshaped[0]} has another shape, and {len(reshaped) - 1} more differ")
    parameters = {name for name, _ in loaded.model.named_parameters()}
    in_blocks = any(name in parameters and inside(name, blocks) for name in lacking)
    values = sum(state[name].numel() for name in lacking)
    if in_blocks or values > _MOST_MISSING * sum(value.numel() for value in state.values()):
        raise ModelError(
            f"{where}: {len(lacking)} of the backbone's {len(state)} tensors are not in the checkpoint, such as "
            f"{min(lacking)}. The folder may mix files of two models, or the weights may be incomplete."
        )


def untrained(model: nn.Module, lacking: set[str]) -> tuple[list[str], list[str]]:
    """Modules of the backbone that are new as a whole, and new parameters that stand beside pretrained ones."""
    parents = sorted({name.rpartition(".")[0] for name in lacking & {n for n, _ in model.named_parameters()}})
    whole = [
        parent
        for parent in parents
        if all(f"{parent}.{name}" in lacking for name, _ in model.get_submodule(parent).named_parameters())
    ]
    loose = sorted(name for name, _ in model.named_parameters() if name in lacking and not inside(name, whole))
    return whole, loose


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter's name lies in one of the modules; all lie in "", the model itself."""
    return any(name.startswith(f"{module}.") or not module for module in modules)
