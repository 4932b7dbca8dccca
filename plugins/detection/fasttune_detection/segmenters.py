"""Opens a segmenter for the classes of train, and says where its parts are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedConfig,
)

from fasttune.errors import ConfigError, ModelError
from fasttune.models import structure
from fasttune.models.checkpoint import load_config, require_family
from fasttune.models.heads import open_headed, restart
from fasttune.models.loading import inside, pretrained, random_model
from fasttune.task import Bundle, Source
from fasttune_detection.families import ONE_SIZE, PER_PIXEL, QUERY_CLASSES, QUERY_MASKS, UNIVERSAL
from fasttune_detection.image_processor import load_processor, multiple_of, processor_of
from fasttune_detection.mask_losses import IGNORED, sum_losses
from fasttune_detection.options import SegmentationOptions
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

_KEPT_RATE = 0.1  # of pretrained parts of the head: new ones get 10 times the rate (SegFormer, arXiv 2105.15203)
_BACKBONE_RATE = 0.1  # MaskFormer (arXiv 2107.06278) and Mask2Former (arXiv 2112.01527): 1e-4 and 1e-5
_CLIP = 0.01  # the code of the same two; EoMT has their loss
_BACKBONE = "pixel_level_module.encoder"
_PADDING = {"labels": IGNORED, "class_labels": -1}
_CLASSIFIERS = frozenset({"classifier"})
_NEVER_RUN = {"dpt": "neck.fusion_stage.layers.0.residual_layer1"}  # the first stage has nothing to add to
_DPT_CLASSIFIERS = ("head.head.4", "auxiliary_head.head.4")  # the last convolutions of two nn.Sequential


def build(source: Source, labels: list[str], options: SegmentationOptions) -> Bundle:
    """Raises ModelError if the folder holds no segmenter that can be trained here, ConfigError if it can't do what
    the options want."""
    config = load_config(source)
    universal = type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
    mapping = MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING if universal else MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
    require_family(source, config, "image-segmentation", mapping)
    check_packages(source, config, "segments" if universal else None)
    kind = processor_of(source, config, {**PER_PIXEL, **UNIVERSAL})
    if not universal and options.kind != "semantic":
        raise ConfigError(
            f"options.kind: model {str(source)!r} ({config.model_type}) gives each pixel a class, and "
            f"doesn't tell objects apart. For {options.kind} take a MaskFormer, Mask2Former or EoMT; else set "
            "options.kind to semantic"
        )
    fixed = _image_size(config) if config.model_type in ONE_SIZE else None
    settings = {
        "do_center_crop": False,
        "keep_aspect_ratio": False,
        "ensure_multiple_of": 1,
        "size_divisor": multiple_of(config) if fixed is None else 1,
    }
    processor, notes = load_processor(source, config, kind, options, fixed=fixed, settings=settings)
    names, keep, was = plan_classes(config, labels)
    name_classes(config, names)
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # it would be fetched, and then replaced by the checkpoint's
    opened = _open_universal if universal else _open_per_pixel
    bundle = opened(source, config, options, names, keep, was)
    bundle.processor = processor
    bundle.notes = (*bundle.notes, *notes)
    normalise_in_one_dtype(bundle.model)
    return bundle


def _open_per_pixel(
    source: Source, config: Any, options: SegmentationOptions, names: list[str], keep: bool, was: int
) -> Bundle:
    """The head is all that stands on the backbone: neck, decoder, auxiliary head."""
    opened = open_headed(source, config, AutoModelForSemanticSegmentation)
    model = opened.model
    never = _NEVER_RUN.get(config.model_type)
    head = opened.head
    if never:
        head = tuple(name for part in head for name in _without(model, part, never))
    classifiers = _DPT_CLASSIFIERS if config.model_type == "dpt" else modules_named(model, _CLASSIFIERS)
    there = dict(model.named_modules())
    classifiers = tuple(name for name in classifiers if name in there and inside(name, head))
    if not classifiers:
        raise ModelError(f"model {str(source)!r}: {type(model).__name__} has no class layers that fasttune knows")
    rates: dict[str, float] = {}
    if source.random_weights:
        notes = (f"new head: {count_classes(names)}", *train_batch_norms(model))
    else:
        rest = {name for name in opened.missing if not inside(name, classifiers)}
        pretrained_parts = [part for part in head if not any(inside(name, [part]) for name in rest)]
        in_classifiers = {name for name in opened.missing if inside(name, classifiers)}
        kept = keep and not in_classifiers
        rates = dict.fromkeys(pretrained_parts, _KEPT_RATE)
        if not kept:
            restart(model, [n for n, _ in model.named_parameters() if inside(n, classifiers)])
            rates |= {name: 1.0 for name in classifiers if inside(name, pretrained_parts)}
        notes = (_said(names, was, kept, opened.mismatched & in_classifiers, not pretrained_parts),)
        if new := sorted(set(head) - set(pretrained_parts)):
            notes += (f"not in the checkpoint, newly initialised: {', '.join(new)}",) if pretrained_parts else ()
    return Bundle(
        model=model,
        processor=None,
        head=head,
        blocks=opened.blocks,
        lora_targets=opened.lora_targets,
        padding=_PADDING,
        notes=(*notes, *opened.notes),
        rates=rates,
        cacheable=False,
    )


def _open_universal(
    source: Source, config: Any, options: SegmentationOptions, names: list[str], keep: bool, was: int
) -> Bundle:
    """The head makes a class and a mask of each query."""
    random = source.random_weights
    loaded = (random_model if random else pretrained)(source, config, AutoModelForUniversalSegmentation)
    model = loaded.model.eval()
    if getattr(config, "use_auxiliary_loss", False) and config.model_type == "maskformer":
        model.config.output_hidden_states = (
            True  # its auxiliary loss reads them, and transformers forgets to ask for them
        )
    sum_losses(model, options.segments_per_image)
    _weigh_no_object(model)
    class_layers, mask_layers = modules_named(model, QUERY_CLASSES), modules_named(model, QUERY_MASKS)
    head = (*class_layers, *mask_layers)
    blocks = attention_blocks(model, head)
    follow_the_head(model, head)
    notes: tuple[str, ...]
    rates: dict[str, float] = {}
    if random:
        notes = ("random weights: nothing is pretrained", *train_batch_norms(model))
        notes = (f"new head: {count_classes(names)}", *notes)
    else:
        buffers = {name for name, _ in model.named_buffers() if inside(name, ["criterion"])}
        check_weights(source, loaded, blocks, (*head, *buffers), base="")
        missing = {name for name in loaded.missing if inside(name, class_layers)}
        kept = keep and not missing
        rates = dict.fromkeys(mask_layers if not kept else head, _KEPT_RATE)
        if not kept:
            _restart_classes(model, class_layers)
        notes = (_said(names, was, kept, loaded.mismatched & missing, False),)
        if backbones := [name for name, _ in model.named_modules() if name.endswith(_BACKBONE)]:
            rates |= dict.fromkeys(backbones, _BACKBONE_RATE)
            notes += (f"the backbone learns at {_BACKBONE_RATE:g} times the rate of the transformer",)
    if config.model_type.startswith("eomt") and bool((model.attn_mask_probs > 0).any()):
        notes += ("attention is masked by predicted masks, also when predicting: EoMT's annealing is not done",)
    return Bundle(
        model=model,
        processor=None,
        head=head,
        blocks=blocks,
        lora_targets=structure.linear_names(model, blocks, head),
        padding=_PADDING,
        notes=notes,
        rates=rates,
        clip=_CLIP,
        cacheable=False,
    )


def _without(model: nn.Module, part: str, never: str) -> list[str]:
    """The part, or what lies in it beside a module that is never run, and so never has a gradient. PEFT takes no
    list for a module to save, and goes by the ends of names: of a list its members, of `head` its `head.head`."""
    module = model.get_submodule(part)
    children = [f"{part}.{name}" for name, _ in module.named_children()]
    if not (isinstance(module, nn.ModuleList) or inside(f"{never}.", [part]) or len(children) == 1):
        return [part]
    return [name for child in children if child != never for name in _without(model, child, never)]


def _image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width)."""
    stated: Any = config.image_size  # type: ignore[attr-defined]
    return (stated, stated) if isinstance(stated, int) else tuple(stated)


def _said(names: list[str], was: int, kept: bool, mismatched: frozenset[str], all_new: bool) -> str:
    if kept:
        return f"head kept: {count_classes(names)}"
    if all_new:
        return f"new head: {count_classes(names)}"
    if mismatched:
        return f"class layers replaced: {was} classes became {len(names)}; the rest of the head kept"
    return f"class layers replaced: their {was} classes are not the ones of train; the rest of the head kept"


def _weigh_no_object(model: Any) -> None:
    """A buffer of one weight a class, which a checkpoint holds for its own number of them."""
    weights = model.criterion.empty_weight
    weights.fill_(1.0)
    weights[-1] = model.criterion.eos_coef


@torch.no_grad()
def _restart_classes(model: nn.Module, layers: tuple[str, ...]) -> None:
    for layer in layers:
        module: Any = model.get_submodule(layer)
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
