"""Tiny segmenters with random weights."""

import torch
import transformers as hf


def _resnet():
    return hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _swin():
    return hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _convnext():
    return hf.ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _upernet(backbone, channels, **settings):
    own = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": channels, "pool_scales": [1, 2]}
    return hf.UperNetConfig(backbone_config=backbone, **{**own, **settings})


_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
_BEIT = {
    **_VIT,
    "intermediate_size": 48,
    "pool_scales": [1, 2],
    "auxiliary_channels": 8,
    "drop_path_rate": 0.0,
    "use_relative_position_bias": True,
}
_MOBILE = {"image_size": 64, "aspp_out_channels": 16, "classifier_dropout_prob": 0.0}
_QUERIES = {"num_queries": 12, "train_num_points": 64}


def _maskformer(backbone, **settings):
    decoder = hf.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        num_queries=12,
        dropout=0.0,
        use_timm_backbone=False,
        backbone_config=_resnet(),
    )
    own = {"fpn_feature_size": 32, "mask_feature_size": 32, "use_auxiliary_loss": True}
    return hf.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **{**own, **settings})


def _mask2former(backbone, **settings):
    own = {
        **_QUERIES,
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 48,
        "dim_feedforward": 48,
        "num_attention_heads": 4,
        "encoder_layers": 1,
        "decoder_layers": 3,
    }
    return hf.Mask2FormerConfig(backbone_config=backbone, **{**own, **settings})


def _eomt(kind, **settings):
    own = {**_VIT, **_QUERIES, "num_blocks": 2, "num_register_tokens": 1}
    return kind(**{**own, **settings})


PER_PIXEL = {
    "segformer": lambda **s: hf.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        **s,
    ),
    "upernet_resnet": lambda **s: _upernet(_resnet(), 24, **s),
    "upernet_swin": lambda **s: _upernet(_swin(), 32, **s),
    "upernet_convnext": lambda **s: _upernet(_convnext(), 24, **s),
    "beit": lambda **s: hf.BeitConfig(**{**_BEIT, "out_indices": [1, 2, 3, 4], **s}),
    "data2vec": lambda **s: hf.Data2VecVisionConfig(**{**_BEIT, "out_indices": [2, 3, 4, 5], **s}),
    "dpt": lambda **s: hf.DPTConfig(
        **_VIT,
        intermediate_size=48,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        semantic_classifier_dropout=0.0,
        **s,
    ),
    "mobilenet_v2": lambda **s: hf.MobileNetV2Config(
        depth_multiplier=0.25, image_size=64, classifier_dropout_prob=0.0, output_stride=16, **s
    ),
    "mobilevit": lambda **s: hf.MobileViTConfig(
        **_MOBILE,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32],
        num_attention_heads=4,
        expand_ratio=1.0,
        **s,
    ),
    "mobilevitv2": lambda **s: hf.MobileViTV2Config(
        **_MOBILE, width_multiplier=0.25, base_attn_unit_dims=[32, 32, 32], n_attn_blocks=[1, 1, 1], **s
    ),
}
UNIVERSAL = {
    "maskformer": lambda **s: _maskformer(_swin(), **s),
    "maskformer_resnet": lambda **s: _maskformer(_resnet(), **s),
    "mask2former": lambda **s: _mask2former(_swin(), **s),
    "mask2former_resnet": lambda **s: _mask2former(_resnet(), **s),
    "eomt": lambda **s: _eomt(hf.EomtConfig, **{"mlp_ratio": 2, **s}),
    "eomt_dinov3": lambda **s: _eomt(hf.EomtDinov3Config, **{"intermediate_size": 64, **s}),
}
_PROCESSORS = {
    "beit": "BeitImageProcessorPil",
    "data2vec": "BeitImageProcessorPil",
    "dpt": "DPTImageProcessorPil",
    "mobilenet_v2": "MobileNetV2ImageProcessorPil",
    "mobilevit": "MobileViTImageProcessorPil",
    "mobilevitv2": "MobileViTImageProcessorPil",
    "maskformer": "MaskFormerImageProcessorPil",
    "maskformer_resnet": "MaskFormerImageProcessorPil",
    "mask2former": "Mask2FormerImageProcessorPil",
    "mask2former_resnet": "Mask2FormerImageProcessorPil",
}
_SIDES = {"height": 64, "width": 64}
_EDGES = {"shortest_edge": 64, "longest_edge": 64}


def write(folder, kind, classes=3, size=None, **settings):
    """A segmenter with random weights and its processor; the folder's name."""
    torch.manual_seed(3)
    if kind in UNIVERSAL:
        config = UNIVERSAL[kind](num_labels=classes, **settings)
        model = hf.AutoModelForUniversalSegmentation.from_config(config)
    else:
        config = PER_PIXEL[kind](num_labels=classes, **settings)
        model = hf.AutoModelForSemanticSegmentation.from_config(config)
    _make_distinct(model)
    model.save_pretrained(folder)
    if kind.startswith("eomt"):
        hf.EomtImageProcessorPil(size=_EDGES, do_pad=True).save_pretrained(folder)
    else:
        processor = getattr(hf, _PROCESSORS.get(kind, "SegformerImageProcessorPil"))
        processor(size=size or _SIDES).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _make_distinct(model):
    """transformers starts many of these so near 0 that predictions would be ties, which rounding decides."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_uniform_(module.weight)
            if "classifier" in name and module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, torch.nn.Embedding) and "quer" in name:
            torch.nn.init.normal_(module.weight)
