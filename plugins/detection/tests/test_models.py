"""What `build` makes of a checkpoint: classes, parts, sizes, and what it refuses."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from fasttune.errors import ConfigError, ModelError
from fasttune.task import Source
from fasttune_detection.frozen import FusedFrozenBatchNorm2d, fuse_frozen_norms
from fasttune_detection.image_processor import Pixels
from fasttune_detection.options import DetectionOptions
from fasttune_detection.parts import check_packages
from fasttune_detection.task import ObjectDetection

KINDS = ["detr", "conditional", "deformable", "two_stage", "dab", "table", "yolos", "rt_detr", "rt_detr_v2"]
KINDS += ["d_fine", "deimv2", "lw_detr", "rf_detr"]


def built(folder, labels=("a", "b", "c"), random=False, **options):
    source = Source(folder)
    source.random_weights = random
    return ObjectDetection(DetectionOptions(**options)).build(source, list(labels))


def notes_of(bundle):
    return "; ".join(bundle.notes)


def name_classes(folder, *names):
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: i for i, name in enumerate(names)}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_other_classes_replace_class_layers_and_keep_the_rest(make_model, tmp_path, kind):
    folder = make_model(tmp_path / "model", kind, classes=3)
    before = hf.AutoModelForObjectDetection.from_pretrained(folder).state_dict()
    bundle = built(folder, ("hen", "pig", "cow", "ewe", "cat"))
    assert "class layers replaced: 3 classes became 5; box layers kept" in notes_of(bundle)
    assert list(bundle.model.config.id2label.values()) == ["hen", "pig", "cow", "ewe", "cat"]
    after = bundle.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("class" in name or "score" in name for name in changed), changed


def test_the_same_classes_keep_the_head_in_the_models_order(make_model, tmp_path):
    folder = make_model(tmp_path / "model", "rt_detr")
    name_classes(folder, "hen", "cat", "pig")
    bundle = built(folder, ("cat", "hen", "pig"))
    assert "head kept: 3 classes" in notes_of(bundle)
    assert bundle.model.config.id2label == {0: "hen", 1: "cat", 2: "pig"}


@pytest.mark.parametrize("kind", ["detr", "yolos", "rt_detr", "deformable"])
def test_as_many_other_classes_start_anew(make_model, tmp_path, kind):
    folder = make_model(tmp_path / "model", kind)
    name_classes(folder, "hen", "cat", "pig")
    before = hf.AutoModelForObjectDetection.from_pretrained(folder).state_dict()
    bundle = built(folder, ("hen", "cat", "cow"))
    assert "their 3 classes are not the ones of train" in notes_of(bundle)
    after = bundle.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("class" in name or "score" in name for name in changed), changed


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_named(make_model, tmp_path, kind):
    bundle = built(make_model(tmp_path / "model", kind))
    modules = dict(bundle.model.named_modules(remove_duplicate=False))
    assert bundle.blocks
    assert {*bundle.head, *bundle.blocks, *bundle.lora_targets, *bundle.rates} <= modules.keys()
    assert all(type(modules[name]) is torch.nn.Linear for name in bundle.lora_targets)
    assert not any("backbone" in name for name in bundle.lora_targets)
    inside = [name for name in bundle.lora_targets if any(name.startswith(f"{head}.") for head in bundle.head)]
    assert not inside
    attention = [name for name in bundle.lora_targets if "attn" in name or "attention" in name]
    assert attention
    assert len(attention) < len(bundle.lora_targets), "feed-forward layers are there too"
    assert bundle.clip == 0.1


def test_frozen_batch_norms_stay_where_they_are_pretrained(make_model, tmp_path):
    folder = make_model(tmp_path / "model", "detr")
    pretrained = {type(module).__name__ for module in built(folder).model.modules()}
    assert "FusedFrozenBatchNorm2d" in pretrained
    assert "DetrFrozenBatchNorm2d" not in pretrained
    bundle = built(folder, random=True)
    norms = [module for module in bundle.model.modules() if "BatchNorm" in type(module).__name__]
    assert {type(norm) for norm in norms} == {torch.nn.BatchNorm2d}
    assert f"{len(norms)} batch norms are trained, {len(norms)} of which transformers would freeze" in notes_of(
        bundle
    )
    assert built(folder).model.state_dict().keys() == bundle.model.state_dict().keys(), "the names are the file's"


def test_a_fused_frozen_batch_norm_is_transformers_own():
    theirs = DetrFrozenBatchNorm2d(12)
    for buffer, low in zip(theirs.buffers(), (-1, -1, -1, 0.5), strict=True):
        torch.nn.init.uniform_(buffer, low, 2.0)
    model = torch.nn.Sequential(copy.deepcopy(theirs)).eval()
    fuse_frozen_norms(model)
    assert type(model[0]) is FusedFrozenBatchNorm2d
    assert not model[0].training
    assert model[0].state_dict().keys() == theirs.state_dict().keys()
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(2, 12, 5, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
            results = []
            for module in (theirs, model):
                y = module(x)
                results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
            assert results[1][0].dtype == dtype
            for one, other in zip(*results, strict=True):
                close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
                torch.testing.assert_close(other.float(), one.float(), **close)


def test_random_batch_norms_let_an_image_through(make_model, tmp_path):
    """transformers draws RT-DETR's scales with a deviation of 0.01."""
    folder = make_model(tmp_path / "model", "rt_detr")
    bundle = built(folder, random=True)
    norms = [module for module in bundle.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) > 20
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    assert not bundle.rates, "nothing is pretrained that should learn slower"


def test_a_timm_backbone_is_asked_for_before_anything_is_read(make_model, tmp_path):
    folder = Path(make_model(tmp_path / "model", "detr"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_timm_backbone": True, "backbone": "resnet50", "backbone_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"resnet50.*timm model: install timm.*no_timm"):
        built(folder)


def test_a_missing_scipy_is_named(monkeypatch):
    monkeypatch.setattr("fasttune_detection.parts.is_scipy_available", lambda: False)
    with pytest.raises(ModelError, match="install scipy"):
        check_packages(Source("model"), hf.RTDetrConfig(), "boxes")


def test_a_type_without_a_loss_is_refused(tmp_path):
    hf.PPDocLayoutV3Config(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"pp_doclayout_v3.*can't be trained"):
        built(tmp_path, random=True)


def test_a_classifier_is_refused(tmp_path):
    hf.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="can't use for object-detection"):
        built(tmp_path, random=True)


@pytest.mark.parametrize(
    ("options", "edges", "said"),
    [
        ({}, (800, 1333), "the checkpoint's own"),
        ({"edges": (300, 512), "image_size": (512, 300)}, (300, 512), "train's median; the checkpoint's own size"),
        ({"edges": (1080, 1920), "image_size": (1920, 1080)}, (800, 1333), "the checkpoint's own"),
        ({"size": (640, 480)}, (480, 640), "options.size"),
    ],
)
def test_sizes_of_models_that_heed_masks(make_model, tmp_path, options, edges, said):
    size = {"shortest_edge": 800, "longest_edge": 1333}
    bundle = built(make_model(tmp_path / "model", "detr", size=size), **options)
    stated = bundle.processor.to_dict()["size"]
    assert (stated["shortest_edge"], stated["longest_edge"]) == edges
    assert said in notes_of(bundle)


@pytest.mark.parametrize(
    ("options", "sides", "said"),
    [
        ({}, (640, 640), "the checkpoint's own"),
        ({"edges": (300, 512), "image_size": (512, 300)}, (288, 512), "would cost 2.8 times the pixels"),
        ({"edges": (1080, 1920), "image_size": (1920, 1080)}, (640, 640), "the checkpoint's own"),
        ({"size": (96, 128)}, (96, 128), "options.size"),
    ],
)
def test_sizes_of_models_that_do_not(make_model, tmp_path, options, sides, said):
    bundle = built(make_model(tmp_path / "model", "rt_detr", size={"height": 640, "width": 640}), **options)
    stated = bundle.processor.to_dict()["size"]
    assert (stated["height"], stated["width"]) == sides
    assert said in notes_of(bundle)


@pytest.mark.parametrize(
    ("image_size", "sides"), [((1920, 1080), (752, 1328)), ((300, 512), (512, 304)), (None, (800, 800))]
)
def test_a_model_without_masks_takes_the_median_shape_where_its_checkpoint_kept_each(
    make_model, tmp_path, image_size, sides
):
    options = {"image_size": image_size, "edges": image_size and tuple(sorted(image_size))}
    size = {"shortest_edge": 800, "longest_edge": 1333}
    stated = built(make_model(tmp_path / "model", "yolos", size=size), **options).processor.to_dict()["size"]
    assert (stated["height"], stated["width"]) == sides


def test_a_size_that_a_model_cant_take_is_refused(make_model, tmp_path):
    with pytest.raises(ConfigError, match=r"multiples of 32, such as \[96, 128\]"):
        built(make_model(tmp_path / "model", "rt_detr"), size=(100, 130))


@pytest.mark.parametrize("kind", ["detr", "yolos", "rt_detr", "deformable"])
@pytest.mark.parametrize("size", [(96, 64), (37, 211), (500, 333), (64, 96)])
def test_pixels_are_those_of_the_processor(make_model, tmp_path, kind, size):
    processor = built(make_model(tmp_path / "model", kind)).processor
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = processor(images=Image.fromarray(values), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(Pixels.of(processor)(Image.fromarray(values)), expected)


def test_medians_and_means_come_from_train():
    sizes = {" 512x300": 3, " 300x512": 2, " 512x511": 4}
    options = ObjectDetection().resolve({"hen": 20, "cat": 7, **sizes})
    assert options.image_size == (512, 511)
    assert options.edges == (300, 512)
    assert options.boxes_per_image == 3.0
    assert ObjectDetection(options).resolve({"hen": 1, " 9x9": 5}) == options, "what is written out stays"


def test_more_boxes_than_queries_are_counted_as_cut(make_model, tmp_path):
    bundle = built(make_model(tmp_path / "model", "detr"))
    task = ObjectDetection()
    boxes = [[x, 0, x + 5, 5] for x in range(15)]
    row = {"image": Image.new("RGB", (96, 64)), "objects": {"boxes": boxes, "labels": ["a"] * 15}}
    assert task.encode(row, bundle, True).truncated == {"objects": 3}


def test_crowds_are_no_targets(make_model, tmp_path):
    bundle = built(make_model(tmp_path / "model", "rt_detr"))
    objects = {"bbox": [[0, 0, 9, 9], [4, 4, 9, 9]], "category": ["a", "b"], "iscrowd": [1, 0]}
    sample = ObjectDetection().encode({"image": Image.new("RGB", (64, 64)), "objects": objects}, bundle, True)
    np.testing.assert_array_equal(sample.tensors["boxes"], [[4, 4, 13, 13]])
    assert sample.tensors["class_labels"].tolist() == [1]
