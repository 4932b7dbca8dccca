"""Tiny detectors with random weights, and pictures of rectangles."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[3]))

COLOURS = {"blue": (30, 60, 220), "red": (220, 40, 30)}

_TRANSFORMER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "auxiliary_loss": True,
    "dropout": 0.0,
}
_RT_DETR = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 12,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_denoising": 10,
    "feat_strides": [8, 16, 32],
}


def _resnet(kind=hf.ResNetConfig, *, stages=("stage4",)):
    return kind(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


def _hgnet():
    return hf.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stage_kernel_size=[3, 3, 3, 3],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, False, False],
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


_THREE = ("stage2", "stage3", "stage4")


def _rt(kind, **settings):
    return kind(backbone_config=_resnet(hf.RTDetrResNetConfig, stages=_THREE), **{**_RT_DETR, **settings})


def _of_hgnet(kind, **settings):
    return kind(backbone_config=_hgnet(), **{**_RT_DETR, "encoder_in_channels": [24, 32, 32], **settings})


def _dab(**settings):
    own = {name: value for name, value in _TRANSFORMER.items() if name != "d_model"}
    return hf.DabDetrConfig(backbone_config=_resnet(), hidden_size=32, **{**own, **settings})


def _yolos(**settings):
    return hf.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=12,
        hidden_dropout_prob=0.0,
        **settings,
    )


def _lw_detr(**settings):
    vit = hf.LwDetrViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        pretrain_image_size=64,
        patch_size=16,
        window_block_indices=[0, 2],
        num_windows=4,
        num_windows_side=2,
        out_indices=[2, 4],
    )
    own = {
        "projector_scale_factors": [1.0],
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_queries": 12,
        "group_detr": 3,
        "dropout": 0.0,
    }
    return hf.LwDetrConfig(backbone_config=vit, **{**own, **settings})


def _rf_detr(**settings):
    dinov2 = hf.RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=64,
        patch_size=16,
        num_windows=2,
        out_indices=[2, 4],
    )
    own = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_queries": 12,
        "group_detr": 3,
        "c2f_num_blocks": 1,
        "dropout": 0.0,
    }
    return hf.RfDetrConfig(backbone_config=dinov2, **{**own, **settings})


def _deformable(**settings):
    # Of 64: with 32 each channel is a group of its own, and the biases before the group norms have no gradient.
    own = {**_TRANSFORMER, "d_model": 64, "num_feature_levels": 4, **settings}
    return hf.DeformableDetrConfig(backbone_config=_resnet(stages=_THREE), **own)


CONFIGS = {
    "detr": lambda **s: hf.DetrConfig(backbone_config=_resnet(), **{**_TRANSFORMER, **s}),
    "conditional": lambda **s: hf.ConditionalDetrConfig(backbone_config=_resnet(), **{**_TRANSFORMER, **s}),
    "deformable": _deformable,
    "two_stage": lambda **s: _deformable(two_stage=True, with_box_refine=True, two_stage_num_proposals=12, **s),
    "dab": _dab,
    "table": lambda **s: hf.TableTransformerConfig(backbone_config=_resnet(), **{**_TRANSFORMER, **s}),
    "yolos": _yolos,
    "rt_detr": lambda **s: _rt(hf.RTDetrConfig, **s),
    "rt_detr_v2": lambda **s: _rt(hf.RTDetrV2Config, **s),
    "d_fine": lambda **s: _of_hgnet(hf.DFineConfig, **s),
    "deimv2": lambda **s: _of_hgnet(hf.Deimv2Config, **s),
    "lw_detr": _lw_detr,
    "rf_detr": _rf_detr,
}
_PROCESSORS = {
    "detr": "DetrImageProcessorPil",
    "table": "DetrImageProcessorPil",
    "conditional": "ConditionalDetrImageProcessorPil",
    "dab": "ConditionalDetrImageProcessorPil",
    "deformable": "DeformableDetrImageProcessorPil",
    "two_stage": "DeformableDetrImageProcessorPil",
    "lw_detr": "DeformableDetrImageProcessorPil",
    "rf_detr": "DeformableDetrImageProcessorPil",
    "yolos": "YolosImageProcessorPil",
}
_EDGES = {"shortest_edge": 64, "longest_edge": 96}


@pytest.fixture
def make_model():
    """make_model(folder, kind, classes=3, size=None, **config): a detector with random weights and its processor;
    the folder's name."""

    def make(folder, kind, classes=3, size=None, **settings):
        torch.manual_seed(3)
        model = hf.AutoModelForObjectDetection.from_config(CONFIGS[kind](num_labels=classes, **settings))
        _make_distinct(model)
        model.save_pretrained(folder)
        name = _PROCESSORS.get(kind, "RTDetrImageProcessorPil")
        size = size or (
            _EDGES if kind in _PROCESSORS and kind not in ("lw_detr", "rf_detr") else {"height": 64, "width": 64}
        )
        getattr(hf, name)(size=size).save_pretrained(folder)
        return str(folder)

    return make


@torch.no_grad()
def _make_distinct(model):
    """transformers starts scales of batch norms near 0, and all queries with the same box: predictions would be
    ties, which rounding decides."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, torch.nn.Linear) and ("bbox" in name or "class" in name):
            torch.nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, torch.nn.Embedding) and "query" in name:
            torch.nn.init.normal_(module.weight)


def draw(path, size, boxes):
    """A picture of filled rectangles, boxes by (colour, x0, y0, x1, y1)."""
    picture = Image.new("RGB", size, (240, 240, 235))
    pen = ImageDraw.Draw(picture)
    for colour, x0, y0, x1, y1 in boxes:
        pen.rectangle([x0, y0, x1 - 1, y1 - 1], fill=COLOURS[colour])
    picture.save(path)


@pytest.fixture
def rectangles(tmp_path):
    """rectangles(count, size=(96, 64), seed=0, most=3): a jsonl file with pictures beside it; its path."""

    def make(count, size=(96, 64), seed=0, most=3, name="rows"):
        chance = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for i in range(count):
            width, height = size if isinstance(size, tuple) else size(i)
            boxes = []
            for _ in range(int(chance.integers(0 if i % 5 == 4 else 1, most + 1))):
                wide, high = chance.integers(12, width // 2), chance.integers(12, height // 2)
                x, y = chance.integers(0, width - wide), chance.integers(0, height - high)
                colour = str(chance.choice(sorted(COLOURS)))
                boxes.append((colour, *(int(edge) for edge in (x, y, x + wide, y + high))))
            if i < 2:  # both classes are there, however few rows
                boxes.append((sorted(COLOURS)[i], 4, 4, 24, 20))
            draw(folder / f"{i}.png", (width, height), boxes)
            spans = [[x0, y0, x1 - x0, y1 - y0] for _, x0, y0, x1, y1 in boxes]
            objects = {"bbox": spans, "category": [box[0] for box in boxes]}
            lines.append(json.dumps({"image": f"{i}.png", "objects": objects}))
        path = folder / "rows.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return make
