"""What opening a detector and opening a segmenter have in common: packages, classes, and where the parts are."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_scipy_available, is_timm_available

from fasttune.errors import ModelError
from fasttune.models import structure
from fasttune.models.loading import Loaded, check_backbone, inside
from fasttune.task import Source
from fasttune_detection.frozen import FROZEN

_GENERIC = re.compile(r"(?:label|class)?[_ -]?\d+", re.IGNORECASE)


def check_packages(source: Source, config: Any, matched: str | None) -> None:
    """Raises ModelError for what transformers would miss in the middle of it. matched: what the loss matches to
    queries, if anything."""
    backbone = getattr(config, "backbone_config", None)
    is_timm = getattr(config, "use_timm_backbone", False) or getattr(backbone, "model_type", "") == "timm_backbone"
    if is_timm and not is_timm_available():
        name = getattr(config, "backbone", None) or getattr(backbone, "backbone", None) or "its backbone"
        raise ModelError(
            f"model {str(source)!r}: its backbone ({name}) is a timm model: install timm, or take a checkpoint "
            "with one of transformers' own (for facebook/detr-resnet-50 the revision no_timm)"
        )
    if matched and not is_scipy_available():
        raise ModelError(f"model {str(source)!r}: {matched} are matched to queries by scipy: install scipy")


def plan_classes(config: PreTrainedConfig, labels: list[str]) -> tuple[list[str], bool, int]:
    """The classes in the order of their ids, whether the checkpoint's class layers stay, and how many it has.

    The same classes, in whatever order, keep the model's ids; unnamed ones of equal number take the labels in
    order; anything else means new layers.
    """
    stated = [str(name) for _, name in sorted((config.id2label or {}).items())]
    if set(stated) == set(labels) and len(stated) == len(labels):
        return stated, True, len(stated)
    generic = all(_GENERIC.fullmatch(name) for name in stated)
    return labels, generic and len(stated) == len(labels), len(stated)


def name_classes(config: PreTrainedConfig, names: list[str]) -> None:
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def modules_named(model: nn.Module, names: frozenset[str]) -> tuple[str, ...]:
    """Modules whose last name is one of these, of a list its members; what is shared bears each of its names."""
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[2] in names:  # PEFT takes no list for a module to save
            listed = isinstance(module, nn.ModuleList)
            found += [f"{name}.{child}" for child in range(len(module))] if listed else [name]
    return tuple(found)


def attention_blocks(model: nn.Module, head: tuple[str, ...]) -> tuple[str, ...]:
    """Layers with attention in depth order: of a backbone that is a transformer, of encoder and decoder."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or inside(f"{name}.", (*head, *lists)):
            continue
        if any("Attention" in type(part).__name__ for part in module.modules()):
            lists.append(name)
    return tuple(f"{name}.{child}" for name in lists for child, _ in model.get_submodule(name).named_children())


def follow_the_head(model: Any, head: tuple[str, ...]) -> None:
    """Where a frozen base stands in eval mode around a head in training, what holds the head trains too: there
    these models add the outputs of all layers, denoising queries and groups of queries, whose losses reach every
    part of the head. Layers with dropout stay in eval mode."""
    first = model.get_submodule(head[0])
    parents = {name[:end] for name in head for end in (0, *(at.start() for at in re.finditer(r"\.", name)))}
    followers = [model.get_submodule(name) for name in sorted(parents) if not inside(f"{name}.", head)]
    if getattr(model.config, "group_detr", 1) > 1:  # its attention keeps the groups apart
        decoder = model.base_model.decoder.modules()
        followers += [module for module in decoder if "Attention" in type(module).__name__]

    def follow(*_: Any) -> None:
        for module in followers:
            module.training = first.training

    model.register_forward_pre_hook(follow)


def normalise_in_one_dtype(model: nn.Module) -> None:
    """Activations that fp32 was mixed into (see `forward`) are of their layer norms' type again."""

    def cast(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(module.weight.dtype) for tensor in inputs)  # type: ignore[arg-type]

    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            module.register_forward_pre_hook(cast)


def train_batch_norms(model: nn.Module) -> tuple[str, ...]:
    """Batch norms as a model from random weights needs them: trained, and with scales of 1.

    transformers freezes those of a backbone, and draws the other scales of the RT-DETR family around 0 with a
    deviation of 0.01, so that nearly nothing of an image gets through.
    """
    frozen = 0
    for parent in list(model.modules()):
        child: Any
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith(FROZEN):
                norm = nn.BatchNorm2d(len(child.weight))
                norm.num_batches_tracked = None  # those that will open its file know no such tensor
                setattr(parent, name, norm)
                frozen += 1
            elif isinstance(child, nn.BatchNorm2d):
                child.reset_parameters()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if not norms:
        return ()
    thawed = f", {frozen} of which transformers would freeze" if frozen else ""
    return (f"{norms} batch norms are trained{thawed}; their scales start at 1",)


def check_weights(
    source: Source, loaded: Loaded, blocks: tuple[str, ...], head: tuple[str, ...], base: str | None = None
) -> None:
    """Raises ModelError if more than the head is missing in the checkpoint. base: the backbone; None: the child
    that is it; "": all of the model."""
    lacking = {name for name in loaded.missing if name not in head and not inside(name, head)}
    if lacking:
        base = structure.base_name(loaded.model) if base is None else base
        check_backbone(source, loaded, base, blocks, lacking)


def count_classes(names: list[str]) -> str:
    return f"{len(names)} class{'es' if len(names) != 1 else ''}"
