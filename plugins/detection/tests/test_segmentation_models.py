"""What `build` makes of a segmenter's checkpoint: classes, parts, sizes; what is seen of a row, and refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from fasttune.errors import ConfigError, DataError, ModelError
from fasttune.task import Source
from fasttune_detection.image_processor import Pixels
from fasttune_detection.mask_losses import IGNORED
from fasttune_detection.options import SegmentationOptions
from fasttune_detection.segmentation import ImageSegmentation

sys.path.insert(0, str(Path(__file__).parent))
import segmenters

KINDS = [*segmenters.PER_PIXEL, *segmenters.UNIVERSAL]
CLASS_LAYERS = ("classifier", "head.4", "class_predictor", "empty_weight")


def built(folder, labels=("a", "b", "c"), random=False, **options):
    source = Source(folder)
    source.random_weights = random
    return ImageSegmentation(SegmentationOptions(**options)).build(source, list(labels))


def notes_of(bundle):
    return "; ".join(bundle.notes)


def change_config(folder, **settings):
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("kind", KINDS)
def test_other_classes_replace_class_layers_and_keep_the_rest(tmp_path, kind):
    folder = segmenters.write(tmp_path / "model", kind, classes=3)
    universal = kind in segmenters.UNIVERSAL
    auto = hf.AutoModelForUniversalSegmentation if universal else hf.AutoModelForSemanticSegmentation
    before = auto.from_pretrained(folder).state_dict()
    bundle = built(folder, ("hen", "pig", "cow", "ewe", "cat"))
    assert "class layers replaced: 3 classes became 5; the rest of the head kept" in notes_of(bundle)
    assert list(bundle.model.config.id2label.values()) == ["hen", "pig", "cow", "ewe", "cat"]
    after = bundle.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(any(layer in name for layer in CLASS_LAYERS) for name in changed), changed
    if universal:
        weights = bundle.model.criterion.empty_weight
        assert weights[:-1].tolist() == [1.0] * 5
        assert weights[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["segformer", "mask2former"])
def test_the_same_classes_keep_the_head_in_the_models_order(tmp_path, kind):
    folder = segmenters.write(tmp_path / "model", kind)
    names = {0: "hen", 1: "cat", 2: "pig"}
    change_config(folder, id2label=names, label2id={name: i for i, name in names.items()})
    bundle = built(folder, ("cat", "hen", "pig"))
    assert "head kept: 3 classes" in notes_of(bundle)
    assert list(bundle.model.config.id2label.values()) == ["hen", "cat", "pig"]
    assert {name for name, rate in bundle.rates.items() if rate == 1.0} == set()


def test_other_names_for_as_many_classes_start_anew(tmp_path):
    folder = segmenters.write(tmp_path / "model", "segformer")
    change_config(folder, id2label={0: "hen", 1: "cat", 2: "pig"}, label2id={"hen": 0, "cat": 1, "pig": 2})
    before = hf.AutoModelForSemanticSegmentation.from_pretrained(folder).decode_head.classifier.weight
    bundle = built(folder, ("ant", "bee", "fly"))
    assert "their 3 classes are not the ones of train" in notes_of(bundle)
    assert not torch.equal(bundle.model.decode_head.classifier.weight, before)


def test_a_backbone_gets_a_new_head_that_learns_faster(tmp_path):
    """An image classifier, as SegFormer's encoders are published."""
    config = segmenters.PER_PIXEL["segformer"](num_labels=10)
    hf.SegformerForImageClassification(config).save_pretrained(tmp_path)
    hf.SegformerImageProcessorPil().save_pretrained(tmp_path)
    bundle = built(tmp_path)
    assert "new head: 3 classes" in notes_of(bundle)
    assert bundle.head == ("decode_head",)
    assert not bundle.rates


def test_new_class_layers_learn_faster_than_what_is_kept(tmp_path):
    bundle = built(segmenters.write(tmp_path / "a", "upernet_swin"), ("a", "b"))
    assert bundle.rates == {
        "decode_head": 0.1,
        "auxiliary_head": 0.1,
        "decode_head.classifier": 1.0,
        "auxiliary_head.classifier": 1.0,
    }
    assert bundle.clip is None
    bundle = built(segmenters.write(tmp_path / "b", "mask2former"), ("a", "b"))
    assert bundle.rates == {
        "model.transformer_module.decoder.mask_predictor.mask_embedder": 0.1,
        "model.pixel_level_module.encoder": 0.1,
    }
    assert bundle.clip == 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_there(tmp_path, kind):
    """Blocks are layers; what LoRA adapts is linear, and no part of the head."""
    bundle = built(segmenters.write(tmp_path / "model", kind))
    assert bundle.blocks
    for name in bundle.lora_targets:
        assert isinstance(bundle.model.get_submodule(name), torch.nn.Linear)
        assert not name.startswith(tuple(f"{part}." for part in bundle.head))
    without = {"upernet_resnet", "mobilenet_v2", "mobilevitv2"}
    assert bool(bundle.lora_targets) == (kind not in without)


def test_a_head_that_is_larger_than_its_backbone_is_still_the_head(tmp_path):
    bundle = built(segmenters.write(tmp_path / "model", "upernet_resnet", hidden_size=64))
    sizes = {
        name: sum(p.numel() for p in bundle.model.get_submodule(name).parameters())
        for name in ("backbone", "decode_head")
    }
    assert sizes["decode_head"] > sizes["backbone"]
    assert bundle.head == ("decode_head", "auxiliary_head")


@pytest.mark.parametrize("wanted", ["instance", "panoptic"])
@pytest.mark.parametrize("kind", ["segformer", "upernet_resnet", "beit"])
def test_a_class_a_pixel_tells_no_objects_apart(tmp_path, kind, wanted):
    folder = segmenters.write(tmp_path / "model", kind)
    with pytest.raises(ConfigError, match=rf"options.kind: .*For {wanted} take a MaskFormer, Mask2Former or EoMT"):
        built(folder, kind=wanted)


def test_types_that_cant_be_trained_are_refused(tmp_path):
    hf.OneFormerConfig(backbone_config=segmenters._swin()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'oneformer', which can't be trained.*Known: segformer, .*mask2former"):
        built(tmp_path, random=True)


def test_a_detector_is_refused(tmp_path):
    hf.YolosConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"can't use for image-segmentation.*do: object-detection"):
        built(tmp_path, random=True)


def test_a_timm_backbone_is_asked_for_before_anything_is_read(tmp_path):
    folder = Path(segmenters.write(tmp_path / "model", "mask2former"))
    change_config(folder, backbone_config={"model_type": "timm_backbone", "backbone": "resnet50"})
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"resnet50.*timm model: install timm"):
        built(folder)


def test_a_missing_scipy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fasttune_detection.parts.is_scipy_available", lambda: False)
    with pytest.raises(ModelError, match="segments are matched to queries by scipy"):
        built(segmenters.write(tmp_path / "one", "mask2former"))
    assert built(segmenters.write(tmp_path / "two", "segformer"))


def test_weights_of_another_model_are_refused(tmp_path):
    folder = Path(segmenters.write(tmp_path / "model", "mask2former"))
    other = Path(segmenters.write(tmp_path / "other", "maskformer"))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="don't fit its configuration"):
        built(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(96, 64), (37, 211)])
def test_pixels_are_those_of_the_processor(tmp_path, kind, size):
    """Also where the model wants blue first, and where its own processor would crop or pad."""
    bundle = built(segmenters.write(tmp_path / "model", kind))
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = bundle.processor(images=Image.fromarray(values), return_tensors="np")["pixel_values"][0]
    found = Pixels.of(bundle.processor)(Image.fromarray(values))
    assert found.shape == (3, 64, 64)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "sides", "said"),
    [
        ("segformer", {}, (512, 512), "the checkpoint's own"),
        ("segformer", {"image_size": (300, 200), "edges": (200, 300)}, (192, 288), "train's median"),
        ("segformer", {"size": (96, 160)}, (96, 160), "options.size"),
        ("mask2former", {"image_size": (300, 200), "edges": (200, 300)}, (192, 288), "train's median"),
    ],
)
def test_sizes_follow_train(tmp_path, kind, options, sides, said):
    folder = segmenters.write(tmp_path / "model", kind, size={"height": 512, "width": 512})
    bundle = built(folder, **options)
    size = bundle.processor.to_dict()["size"]
    assert (size["height"], size["width"]) == sides
    assert said in notes_of(bundle)


@pytest.mark.parametrize("kind", ["beit", "data2vec", "eomt", "eomt_dinov3"])
def test_position_embeddings_fix_the_size(tmp_path, kind):
    folder = segmenters.write(tmp_path / "model", kind)
    bundle = built(folder, image_size=(40, 30), edges=(30, 40))
    assert "64 x 64 (height x width), whatever their shape: the one that the model takes" in notes_of(bundle)
    assert built(folder, size=(64, 64))
    with pytest.raises(ConfigError, match=r"options.size: \[128, 128\]: this model takes one size, \[64, 64\]"):
        built(folder, size=(128, 128))


def test_a_size_that_a_model_cant_take_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"multiples of 32, such as \[96, 128\]"):
        built(segmenters.write(tmp_path / "model", "segformer"), size=(100, 130))


def row_of(*masks, size=(64, 64), labels=None):
    labels = labels or [*"abc"][: len(masks)]
    return {"image": Image.new("RGB", size), "objects": {"masks": list(masks), "labels": labels}}


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def test_pixels_without_truth_have_no_label(tmp_path):
    bundle = built(segmenters.write(tmp_path / "model", "segformer"))
    task = ImageSegmentation(SegmentationOptions())
    sample = task.encode(row_of(square(0, 0, 32), square(16, 16, 32)), bundle, True)
    labels = sample.tensors["labels"]
    assert labels[4, 4] == 0
    assert labels[20, 20] == 1, "later objects lie above"
    assert labels[60, 60] == IGNORED
    assert "truth" in task.show(sample, bundle)


def test_segments_that_are_lost_are_counted_as_cut(tmp_path):
    """Too small for the model's size, or more than it has queries."""
    bundle = built(segmenters.write(tmp_path / "model", "mask2former"), kind="instance")
    task = ImageSegmentation(SegmentationOptions(kind="instance"))
    row = row_of(square(0, 0, 300), square(401, 401, 4), size=(640, 640))
    sample = task.encode(row, bundle, True)
    assert sample.tensors["class_labels"].tolist() == [0]
    assert sample.truncated == {"objects": 1}
    row = row_of(*(square(4 * i, 0, 4) for i in range(15)), labels=["a"] * 15)
    assert task.encode(row, bundle, True).truncated == {"objects": 3}


def test_crowds_are_no_targets(tmp_path):
    bundle = built(segmenters.write(tmp_path / "model", "mask2former"), kind="instance")
    row = row_of(square(0, 0, 30), square(20, 20, 30))
    row["objects"]["crowd"] = [1, 0]
    sample = ImageSegmentation(SegmentationOptions(kind="instance")).encode(row, bundle, True)
    assert sample.tensors["class_labels"].tolist() == [1]


def test_medians_means_and_stuff_come_from_train():
    task = ImageSegmentation(SegmentationOptions(kind="panoptic"))
    sky = {"id": 3, "label": "sky", "thing": False}
    row = {"image": (512, 300), "objects": {"segments": [{"id": 1, "label": "hen", "thing": True}, sky]}}
    assert set(task.count(row)) == {" 512x300", " stuff sky"}
    options = task.resolve({"hen": 20, "sky": 7, " 512x300": 9, " stuff sky": 7})
    assert options.image_size == (512, 300)
    assert options.segments_per_image == 3.0
    assert options.stuff == ("sky",)
    assert ImageSegmentation(options).resolve({"hen": 1, " 9x9": 5}) == options, "what is written out stays"


def test_a_background_is_stuff():
    options = SegmentationOptions(kind="panoptic", background="ground")
    row = {"image": (8, 8), "objects": {"masks": [], "labels": []}}
    assert set(ImageSegmentation(options).count(row)) == {" 8x8", " stuff ground"}


def test_one_class_alone_is_nothing_to_learn():
    with pytest.raises(DataError, match=r"one class, 'cat'.*options.background"):
        ImageSegmentation(SegmentationOptions()).resolve({"cat": 9, " 8x8": 9})
    assert ImageSegmentation(SegmentationOptions(kind="instance")).resolve({"cat": 9, " 8x8": 9})
    with pytest.raises(DataError, match="none of the 9 images to train on has a segment"):
        ImageSegmentation(SegmentationOptions(kind="instance")).resolve({" 8x8": 9})


def test_truth_must_be_there():
    with pytest.raises(DataError, match="a column `mask`"):
        ImageSegmentation().check_columns(frozenset({"image"}))
    ImageSegmentation().check_columns(frozenset({"image", "objects"}))
