"""Deformable attention by our op in transformers' models: losses and gradients as without; what is left alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

from fasttune import deformable
from fasttune.adapt import adapt
from fasttune.config import Full
from fasttune.deformable import DeformableAttention, replace
from fasttune.ops import backend, forget_uses, used
from fasttune.task import Bundle

KERNEL = backend("deformable_attention", torch.empty(0))
needs_kernel = pytest.mark.skipif(KERNEL.name == "reference", reason=f"no kernel: {KERNEL.why}")
BF16, CPU = torch.bfloat16, torch.device("cpu")
THREE = ("stage2", "stage3", "stage4")
RT = {
    "encoder_hidden_dim": 32,
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
    "num_labels": 3,
}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
    "dropout": 0.0,
    "num_labels": 3,
}


def resnet(kind=hf.ResNetConfig, stages=THREE):
    return kind(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        layer_type="basic",
        out_features=list(stages),
    )


def hgnet():
    return hf.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8] * 4,
        stage_out_channels=[16, 24, 32, 32],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        stage_kernel_size=[3] * 4,
        stage_downsample=[False, True, True, True],
        stage_light_block=[False] * 4,
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 32],
        depths=[1] * 4,
        out_features=list(THREE),
    )


def of_resnet(kind, **settings):
    backbone = resnet(hf.RTDetrResNetConfig)
    return kind(backbone_config=backbone, encoder_in_channels=[16, 24, 32], **{**RT, **settings})


def of_hgnet(kind, **settings):
    return kind(backbone_config=hgnet(), encoder_in_channels=[24, 32, 32], **{**RT, **settings})


def mask2former():
    settings = {name: DETR[name] for name in ("num_queries", "decoder_layers", "encoder_layers", "num_labels")}
    return hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1] * 4,
            num_heads=[1, 2, 2, 4],
            window_size=4,
            drop_path_rate=0.0,
            out_features=["stage1", *THREE],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        dim_feedforward=48,
        num_attention_heads=4,
        train_num_points=64,
        dropout=0.0,
        **settings,
    )


# A config, and in how many places it samples.
MODELS = {
    "rt_detr": (lambda: of_resnet(hf.RTDetrConfig), 2),
    "rt_detr_v2": (lambda: of_resnet(hf.RTDetrV2Config), 2),
    "d_fine": (lambda: of_hgnet(hf.DFineConfig), 2),
    "d_fine, points by level": (lambda: of_hgnet(hf.DFineConfig, decoder_n_points=[3, 6, 3]), 2),
    "deimv2": (lambda: of_hgnet(hf.Deimv2Config), 2),
    "deformable_detr": (lambda: hf.DeformableDetrConfig(backbone_config=resnet(), **{**DETR, "d_model": 64}), 3),
    "mask2former": (mask2former, 1),
}


def build(kind):
    torch.manual_seed(3)
    settings = MODELS[kind][0]()
    auto = hf.AutoModelForUniversalSegmentation if kind == "mask2former" else hf.AutoModelForObjectDetection
    model = auto.from_config(settings)
    with torch.no_grad():
        for name, module in model.named_modules():  # at the start many are so small or alike that rounding decides
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
            if isinstance(module, nn.Linear) and ("bbox" in name or "class" in name):
                nn.init.normal_(module.weight, std=0.3)
            if isinstance(module, nn.Embedding) and "query" in name:
                nn.init.normal_(module.weight)
            if isinstance(module, nn.Linear) and name.endswith("sampling_offsets"):
                nn.init.normal_(module.weight, std=0.1)
                # Off the pixels' centres, where a derivative jumps.
                module.bias.add_(torch.rand(module.bias.shape) * 0.3 + 0.1)
    return model


def batch(kind):
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 64, 96, generator=random)
    if kind == "mask2former":
        masks = [(torch.rand(3, 64, 96, generator=random) > 0.5).float() for _ in range(2)]
        return {"pixel_values": pixels, "mask_labels": masks, "class_labels": [torch.tensor([0, 2, 1])] * 2}
    boxes = torch.rand(2, 3, 4, generator=random) * 0.3 + 0.2
    return {
        "pixel_values": pixels,
        "labels": [{"class_labels": torch.tensor([0, 2, 1]), "boxes": rows} for rows in boxes],
    }


def loss_and_gradients(model, kind, **options):
    torch.manual_seed(5)  # denoising queries, points of masks
    loss = model.train()(**batch(kind), **options).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), {
        name: gradient.detach()
        for (name, _), gradient in zip(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad], gradients, strict=True
        )
        if gradient is not None
    }


@needs_kernel
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_the_models_own(kind):
    theirs, ours = build(kind), build(kind)
    said = replace(ours, torch.float32, CPU)
    assert said == f"deformable attention: fasttune (its own kernel, in {MODELS[kind][1]} places)"
    forget_uses()
    loss, gradients = loss_and_gradients(ours, kind)
    assert "deformable_attention, float32" in used()
    forget_uses()
    expected, right = loss_and_gradients(theirs, kind)
    assert not used(), "the other model of that class is untouched"
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == right.keys()
    assert any("sampling_offsets" in name and bool(gradient.any()) for name, gradient in gradients.items())
    whole = torch.stack([gradient.norm() for gradient in right.values()]).norm()
    for name, gradient in gradients.items():
        # Rounding, through some dozens of layers.
        assert (gradient - right[name]).norm() <= 1e-3 * right[name].norm() + 1e-5 * whole, name


@needs_kernel
@pytest.mark.parametrize("kind", MODELS)
def test_bf16_under_autocast_errs_no_more_than_the_models_own(kind):
    model = build(kind).eval()
    pixels = batch(kind)["pixel_values"]
    found = []
    for name in ("exact", "theirs", "ours"):
        one = copy.deepcopy(model)
        if name == "ours":
            assert "fasttune" in replace(one, BF16, CPU)
        with torch.no_grad(), torch.autocast("cpu", BF16, enabled=name != "exact"):
            out = one(pixel_values=pixels)
        # What deformable attention makes of the image, before queries are picked by their scores.
        states = out.encoder_last_hidden_state if kind != "mask2former" else out.pixel_decoder_last_hidden_state
        found.append((states[-1] if isinstance(states, (list, tuple)) else states).double())
    exact, theirs, ours = found
    assert ours.isfinite().all()
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm() + 1e-3 * exact.norm()


@needs_kernel
@pytest.mark.parametrize("kind", MODELS)
def test_bf16_trains(kind):
    model = build(kind)
    adapted = adapt(Bundle(model, None, (), (), ()), Full(), dtype=BF16)
    assert f"in {MODELS[kind][1]} places" in adapted.attention
    with torch.autocast("cpu", BF16):
        loss, gradients = loss_and_gradients(model, kind)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    sampled = [gradient for name, gradient in gradients.items() if "sampling_offsets" in name]
    assert sampled
    assert all(gradient.any() for gradient in sampled)


@needs_kernel
@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2", "d_fine"])
def test_a_copy_and_a_saved_model_are_whole(kind, tmp_path):
    model = build(kind).eval()
    replace(model, torch.float32, CPU)
    pixels = batch(kind)["pixel_values"]
    again = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    opened = hf.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        assert torch.equal(again(pixel_values=pixels).logits, expected)
        torch.testing.assert_close(opened(pixel_values=pixels).logits, expected, rtol=1e-3, atol=1e-4)
        for parameter in again.parameters():
            parameter.zero_()
        assert not torch.equal(again(pixel_values=pixels).logits, expected), "its forward is the copy's own"


@needs_kernel
def test_the_discrete_method_stays_as_it_is():
    torch.manual_seed(3)
    settings = of_resnet(hf.RTDetrV2Config, decoder_method="discrete")
    theirs = hf.AutoModelForObjectDetection.from_config(settings).eval()
    ours = copy.deepcopy(theirs)
    replace(ours, torch.float32, CPU)
    pixels = batch("rt_detr_v2")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(ours(pixel_values=pixels).logits, theirs(pixel_values=pixels).logits)


@needs_kernel
@pytest.mark.parametrize(
    "module",
    ["rt_detr", "lw_detr", "rf_detr", "grounding_dino", "mm_grounding_dino", "omdet_turbo", "deformable_detr"],
)
def test_each_familys_module_is_replaced(module):
    file = __import__(
        f"transformers.models.{module}.modeling_{module}", fromlist=["MultiScaleDeformableAttention"]
    )
    parent = nn.Module()
    parent.attn = file.MultiScaleDeformableAttention()
    assert replace(parent, torch.float32, CPU).endswith("in 1 places)")
    assert type(parent.attn) is DeformableAttention


class Doubled(MultiScaleDeformableAttention):
    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        return 2 * super().forward(
            value,
            value_spatial_shapes,
            value_spatial_shapes_list,
            level_start_index,
            sampling_locations,
            attention_weights,
            im2col_step,
        )


class Renamed(nn.Module):
    def forward(self, value, shapes, sampling_locations, attention_weights):
        return value


class Broken(nn.Module):
    def forward(self, value, value_spatial_shapes, sampling_locations, attention_weights):
        raise RuntimeError("on a GPU only")


@needs_kernel
@pytest.mark.parametrize("form", [Doubled, Renamed, Broken])
def test_what_answers_otherwise_is_left_alone_and_said(form):
    parent = nn.Module()
    parent.good, parent.other = (
        MultiScaleDeformableAttention(),
        type("MultiScaleDeformableAttention", (form,), {})(),
    )
    said = replace(parent, torch.float32, CPU)
    assert type(parent.good) is DeformableAttention
    assert isinstance(parent.other, form)
    assert "in 1 places), left alone where its answers or arguments are others: " in said
    assert said.endswith(".MultiScaleDeformableAttention")


def test_models_without_it_are_not_touched_nor_asked(monkeypatch):
    monkeypatch.setattr(deformable, "_agree", lambda *_: pytest.fail("nothing to compare"))
    model = hf.AutoModel.from_config(hf.ViTConfig(hidden_size=32, num_hidden_layers=1, image_size=32))
    assert replace(model, torch.float32, CPU) == ""


def test_other_devices_and_types_keep_the_models_own():
    for dtype, device in ((torch.float32, torch.device("cuda")), (torch.float64, CPU)):
        parent = nn.Module()
        parent.attn = MultiScaleDeformableAttention()
        assert replace(parent, dtype, device).startswith("deformable attention: the model's own")
        assert type(parent.attn) is MultiScaleDeformableAttention


WITHOUT = """
import torch
from torch import nn
from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention
from fasttune.deformable import replace
parent = nn.Module()
parent.attn = MultiScaleDeformableAttention()
print(replace(parent, torch.float32, torch.device("cpu")))
"""


def test_without_kernels_the_models_own_stays():
    environment = {**os.environ, "FASTTUNE_REFERENCE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "deformable attention: the model's own (not ours: FASTTUNE_REFERENCE is set)\n"
