"""A pretrained backbone under a task's new head: opening both, and telling what of them is trained already."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from fasttune.models import structure
from fasttune.models.loading import (
    by_its_backbone,
    check_backbone,
    inside,
    pretrained,
    random_model,
    untrained,
)
from fasttune.task import Source


@dataclass(frozen=True)
class Headed:
    """A model, and the names that `Bundle` wants.

    head: the modules outside the backbone, then those of the backbone that the checkpoint lacks as a whole.
    missing: the head's own weights that the checkpoint lacks, or holds in another shape (`mismatched`); empty
        where the weights are random.
    notes: what the user should know of the backbone.
    """

    model: Any
    head: tuple[str, ...]
    blocks: tuple[str, ...]
    lora_targets: tuple[str, ...]
    missing: frozenset[str]
    mismatched: frozenset[str]
    notes: tuple[str, ...]


def open_headed(source: Source, config: PreTrainedConfig, auto: Any) -> Headed:
    """The model of an auto class whose head the checkpoint may lack, in eval mode.

    config: as loaded, the size of the head written into it. Raises ModelError if the checkpoint can't be opened or
    lacks weights of the backbone.
    """
    loaded = random_model(source, config, auto) if source.random_weights else pretrained(source, config, auto)
    model = loaded.model.eval()
    base = structure.base_name(model)
    blocks = structure.block_names(model, base)
    if any(inside(name, blocks) for name in loaded.missing):
        loaded = by_its_backbone(source, config, loaded, base)
    head = structure.head_modules(model, base)
    missing = {name for name in loaded.missing if inside(name, head) or not inside(name, [base])}
    notes = []
    if source.random_weights:
        notes.append("random weights: nothing is pretrained")
    else:
        lacking = set(loaded.missing) - missing
        check_backbone(source, loaded, base, blocks, lacking)
        modules, loose = untrained(model, lacking)
        head += modules
        if modules or loose:
            notes.append(f"not in the checkpoint, newly initialised: {', '.join([*modules, *loose])}")
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # such a model never reads the keys and values that it would keep
    return Headed(
        model,
        tuple(head),
        blocks,
        structure.linear_names(model, blocks, head),
        frozenset(missing),
        loaded.mismatched,
        tuple(notes),
    )


def restart(model: Any, names: Iterable[str]) -> None:
    """Draws parameters anew: weights from a normal distribution, biases at zero, as transformers does."""
    deviation = getattr(model.config, "initializer_range", None) or 0.02
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=deviation)
        else:
            nn.init.zeros_(parameter)
