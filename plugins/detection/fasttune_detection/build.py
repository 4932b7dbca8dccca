"""Opens a detector for the classes of train, and says where its parts are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoModelForObjectDetection

from fasttune.errors import ModelError
from fasttune.models import structure
from fasttune.models.checkpoint import load_config, require_family
from fasttune.models.loading import Loaded, inside, pretrained, random_model
from fasttune.task import Bundle, Source
from fasttune_detection.families import (
    BACKBONES,
    BOX_LAYERS,
    CLASS_LAYERS,
    HEED_PADDING,
    PROCESSORS,
    SOFTMAX_LOSS,
)
from fasttune_detection.frozen import frozen_norms, fuse_frozen_norms
from fasttune_detection.image_processor import load_processor, processor_of
from fasttune_detection.losses import sum_losses
from fasttune_detection.options import DetectionOptions
from fasttune_detection.parts import (
    attention_blocks,
    check_packages,
    check_weights,
    count_classes,
    follow_the_head,
    modules_named,
    name_classes,
    normalise_in_one_dtype,
    plan_classes,
    train_batch_norms,
)

_CLIP = 0.1  # DETR (arXiv 2005.12872) and all that followed it
_KEPT_RATE = 0.1  # of box layers: pretrained, they stand beside new class layers, which get 10 times the rate
_BACKBONE_RATE = 0.1  # the same: 1e-4 for the transformer, 1e-5 for the backbone


def build(source: Source, labels: list[str], options: DetectionOptions) -> Bundle:
    """Raises ModelError if the folder holds no detector that can be trained here."""
    config = load_config(source)
    require_family(source, config, "object-detection", MODEL_FOR_OBJECT_DETECTION_MAPPING)
    check_packages(source, config, "boxes")
    kind = processor_of(source, config, PROCESSORS)
    heeds = config.model_type in HEED_PADDING
    processor, notes = load_processor(source, config, kind, options, heeds_padding=heeds)
    names, keep, was = plan_classes(config, labels)
    name_classes(config, names)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # it would be fetched, and then replaced by the checkpoint's
    random = source.random_weights
    loaded = (random_model if random else pretrained)(source, config, AutoModelForObjectDetection)
    model = loaded.model.eval()
    sum_losses(model, options.boxes_per_image)
    class_layers = modules_named(model, CLASS_LAYERS)
    head = (*class_layers, *modules_named(model, BOX_LAYERS))
    if not class_layers:
        raise ModelError(f"model {str(source)!r}: {type(model).__name__} has no class layers that fasttune knows")
    blocks = attention_blocks(model, head)
    follow_the_head(model, head)
    normalise_in_one_dtype(model)
    if random:
        notes = ("random weights: nothing is pretrained", *train_batch_norms(model), *notes)
        head_note = f"new head: {count_classes(names)}"
    else:
        check_weights(source, loaded, blocks, head)
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
        rates |= dict.fromkeys(modules_named(model, BOX_LAYERS), _KEPT_RATE)
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


def _settle_classes(loaded: Loaded, layers: tuple[str, ...], keep: bool, was: int, names: list[str]) -> str:
    """Starts the class layers anew where they mean other classes than those of train. Says what was done."""
    model = loaded.model
    missing = {name for name in loaded.missing if inside(name, layers)}
    if keep and not missing:
        return f"head kept: {count_classes(names)}"
    _restart(model, layers, len(names))
    if missing - loaded.mismatched:
        return f"new class layers: {count_classes(names)}; box layers kept"
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
