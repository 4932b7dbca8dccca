"""Opens a detector for the classes of train, and says where its parts are."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoModelForObjectDetection, PreTrainedConfig
from transformers.utils.import_utils import is_scipy_available, is_timm_available

from fasttune.errors import ModelError
from fasttune.models import structure
from fasttune.models.checkpoint import load_config, require_family
from fasttune.models.loading import Loaded, check_backbone, inside, pretrained, random_model
from fasttune.task import Bundle, Source
from fasttune_detection.families import BACKBONES, BOX_LAYERS, CLASS_LAYERS, SOFTMAX_LOSS
from fasttune_detection.frozen import FROZEN, frozen_norms, fuse_frozen_norms
from fasttune_detection.image_processor import load_processor
from fasttune_detection.losses import sum_losses
from fasttune_detection.options import DetectionOptions

_GENERIC = re.compile(r"(?:label|class)?[_ -]?\d+", re.IGNORECASE)
_CLIP = 0.1  # DETR (arXiv 2005.12872) and all that followed it
_KEPT_RATE = 0.1  # of box layers: pretrained, they stand beside new class layers, which get 10 times the rate
_BACKBONE_RATE = 0.1  # the same: 1e-4 for the transformer, 1e-5 for the backbone


def build(source: Source, labels: list[str], options: DetectionOptions) -> Bundle:
    """Raises ModelError if the folder holds no detector that can be trained here."""
    config = load_config(source)
    require_family(source, config, "object-detection", MODEL_FOR_OBJECT_DETECTION_MAPPING)
    _check_packages(source, config)
    processor, notes = load_processor(source, config, options)
    names, keep, was = _plan(config, labels)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # it would be fetched, and then replaced by the checkpoint's
    random = source.random_weights
    loaded = (random_model if random else pretrained)(source, config, AutoModelForObjectDetection)
    model = loaded.model.eval()
    sum_losses(model, options.boxes_per_image)
    class_layers = _named(model, CLASS_LAYERS)
    head = (*class_layers, *_named(model, BOX_LAYERS))
    if not class_layers:
        raise ModelError(f"model {str(source)!r}: {type(model).__name__} has no class layers that fasttune knows")
    blocks = _blocks(model, head)
    _follow_the_head(model, head)
    _normalise_in_one_dtype(model)
    if random:
        notes = ("random weights: nothing is pretrained", *_train_batch_norms(model), *notes)
        head_note = f"new head: {_count(names)}"
    else:
        _check_weights(source, loaded, blocks, head)
        head_note = _settle_classes(loaded, class_layers, keep, was, names)
    backbones = tuple(name for name, _ in model.named_modules() if name.rpartition(".")[2] in BACKBONES)
    rates = {}
    if backbones and not random:
        backbone = min(backbones, key=len)
        rates[backbone] = _BACKBONE_RATE
        notes = (*notes, f"the backbone learns at {_BACKBONE_RATE:g} times the rate of the transformer")
        if frozen := frozen_norms(model):
            notes = (*notes, f"{frozen} batch norms of the backbone stay as they were pretrained")
    if not random:
        rates |= dict.fromkeys(_named(model, BOX_LAYERS), _KEPT_RATE)
    fuse_frozen_norms(model)
    return Bundle(
        model=model,
        processor=processor,
        head=head,
        blocks=blocks,
        lora_targets=structure.linear_names(model, [b for b in blocks if not inside(b, backbones)], head),
        padding={"class_labels": -1},
        notes=(head_note, *notes),
        rates=rates,
        clip=_CLIP,
        cacheable=False,
    )


def _check_packages(source: Source, config: Any) -> None:
    """What transformers would miss in the middle of it."""
    backbone = getattr(config, "backbone_config", None)
    is_timm = getattr(config, "use_timm_backbone", False) or getattr(backbone, "model_type", "") == "timm_backbone"
    if is_timm and not is_timm_available():
        name = getattr(config, "backbone", None) or getattr(backbone, "backbone", None) or "its backbone"
        raise ModelError(
            f"model {str(source)!r}: its backbone ({name}) is a timm model: install timm, or take a checkpoint "
            "with one of transformers' own (for facebook/detr-resnet-50 the revision no_timm)"
        )
    if not is_scipy_available():
        raise ModelError(f"model {str(source)!r}: boxes are matched to queries by scipy: install scipy")


def _plan(config: PreTrainedConfig, labels: list[str]) -> tuple[list[str], bool, int]:
    """The classes in the order of their ids, whether the checkpoint's class layers stay, and how many it has.

    The same classes, in whatever order, keep the model's ids; unnamed ones of equal number take the labels in
    order; anything else means new layers.
    """
    stated = [str(name) for _, name in sorted((config.id2label or {}).items())]
    if set(stated) == set(labels) and len(stated) == len(labels):
        return stated, True, len(stated)
    generic = all(_GENERIC.fullmatch(name) for name in stated)
    return labels, generic and len(stated) == len(labels), len(stated)


def _named(model: nn.Module, names: frozenset[str]) -> tuple[str, ...]:
    """Modules whose last name is one of these, of a list its members; what is shared bears each of its names."""
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[2] in names:  # PEFT takes no list for a module to save
            listed = isinstance(module, nn.ModuleList)
            found += [f"{name}.{child}" for child in range(len(module))] if listed else [name]
    return tuple(found)


def _blocks(model: nn.Module, head: tuple[str, ...]) -> tuple[str, ...]:
    """Layers with attention in depth order: of a backbone that is a transformer, of encoder and decoder."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or inside(f"{name}.", (*head, *lists)):
            continue
        if any("Attention" in type(part).__name__ for part in module.modules()):
            lists.append(name)
    return tuple(f"{name}.{child}" for name in lists for child, _ in model.get_submodule(name).named_children())


def _follow_the_head(model: Any, head: tuple[str, ...]) -> None:
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


def _normalise_in_one_dtype(model: nn.Module) -> None:
    """Activations that fp32 was mixed into (see `forward`) are of their layer norms' type again."""

    def cast(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(module.weight.dtype) for tensor in inputs)  # type: ignore[arg-type]

    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            module.register_forward_pre_hook(cast)


def _train_batch_norms(model: nn.Module) -> tuple[str, ...]:
    """Batch norms as a model from random weights needs them: trained, and with scales of 1.

    transformers freezes those of a backbone, and draws the other scales of the RT-DETR family around 0 with a
    deviation of 0.01, so that nearly nothing of an image gets through.
    """
    frozen = 0
    for parent in list(model.modules()):
        child: Any
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith(FROZEN):
                setattr(parent, name, nn.BatchNorm2d(len(child.weight)))
                frozen += 1
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_parameters()
    if not norms:
        return ()
    thawed = f", {frozen} of which transformers would freeze" if frozen else ""
    return (f"{len(norms)} batch norms are trained{thawed}; their scales start at 1",)


def _check_weights(source: Source, loaded: Loaded, blocks: tuple[str, ...], head: tuple[str, ...]) -> None:
    """Raises ModelError if more than classes is missing in the checkpoint."""
    lacking = {name for name in loaded.missing if not inside(name, head)}
    if lacking:
        check_backbone(source, loaded, structure.base_name(loaded.model), blocks, lacking)


def _settle_classes(loaded: Loaded, layers: tuple[str, ...], keep: bool, was: int, names: list[str]) -> str:
    """Starts the class layers anew where they mean other classes than those of train. Says what was done."""
    model = loaded.model
    missing = {name for name in loaded.missing if inside(name, layers)}
    if keep and not missing:
        return f"head kept: {_count(names)}"
    _restart(model, layers, len(names))
    if missing - loaded.mismatched:
        return f"new class layers: {_count(names)}; box layers kept"
    if missing:
        return f"class layers replaced: {was} classes became {len(names)}; box layers kept"
    return f"class layers replaced: their {was} classes are not the ones of train; box layers kept"


@torch.no_grad()
def _restart(model: Any, layers: tuple[str, ...], classes: int) -> None:
    """Draws the last linear layer of each class head anew, and the embeddings of classes. With a sigmoid a class
    starts as likely as RT-DETR has it, 1 / (classes + 1); with softmax all are equal."""
    softmax = model.loss_function.name == SOFTMAX_LOSS
    bias = 0.0 if softmax else -math.log(classes)
    outputs = (classes, classes + 1)
    for layer in layers:
        for module in model.get_submodule(layer).modules():
            if isinstance(module, nn.Linear) and module.out_features in outputs:
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.bias, bias)
            elif isinstance(module, nn.Embedding):
                nn.init.xavier_uniform_(module.weight)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])


def _count(names: list[str]) -> str:
    return f"{len(names)} class{'es' if len(names) != 1 else ''}"
