"""image-classification over the architectures that people use, against transformers' own pipeline."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

from fasttune.errors import ModelError
from fasttune.task import Source
from fasttune_classification.image import ImageClassification

LABELS = ["cat", "dog", "owl"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
HIERARCHY = {"depths": [1, 1, 2], "num_stages": 3}

CONFIGS = {
    "resnet": lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    "vit": lambda: hf.ViTConfig(image_size=32, patch_size=8, **SMALL),
    "convnext": lambda: hf.ConvNextConfig(hidden_sizes=[8, 16, 32], **HIERARCHY),
    "swin": lambda: hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    ),
    "mobilenet_v2": lambda: hf.MobileNetV2Config(depth_multiplier=0.25, min_depth=8),
    "dinov2": lambda: hf.Dinov2Config(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    ),
}
CONVOLUTIONS = ("resnet", "mobilenet_v2")
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture
def make(tmp_path):
    def write(kind, **settings):
        folder = tmp_path / kind
        hf.AutoModel.from_config(CONFIGS[kind]()).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | settings))
        return Source(str(folder))

    return write


@pytest.fixture
def images():
    random = np.random.default_rng(5)
    sizes = [(41, 33), (7, 90), (1, 1), (64, 64)]
    return [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


@pytest.mark.parametrize("kind", CONFIGS)
def test_architectures(kind, make, images, collate, tmp_path):
    task = ImageClassification()
    bundle = task.build(make(kind), LABELS)
    assert bundle.notes[0] == "new head: 3 classes"
    modules = dict(bundle.model.named_modules())
    assert {*bundle.head, *bundle.blocks, *bundle.lora_targets} <= modules.keys()
    assert len(bundle.blocks) >= 2
    assert bool(bundle.lora_targets) == (kind not in CONVOLUTIONS)

    data = [{"image": image, "label": LABELS[i % 3]} for i, image in enumerate(images)]
    samples = [task.encode(row, bundle, True) for row in data]
    assert {s.tensors["pixel_values"].shape for s in samples} == {(3, 32, 32)}
    assert {s.tensors["pixel_values"].dtype for s in samples} == {np.dtype("float32")}
    assert {s.cost for s in samples} == {32 * 32}
    loss, predictions = task.score(bundle.model, collate(samples, bundle.padding), bundle)
    single = [task.decode(bundle.model, collate([s], bundle.padding), bundle)[0] for s in samples]
    for together, alone in zip(predictions, single, strict=True):
        assert together["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    wanted = -sum(np.log(p["scores"][row["label"]]) for p, row in zip(predictions, data, strict=True))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)

    bundle.model.save_pretrained(tmp_path / "out")
    bundle.processor.save_pretrained(tmp_path / "out")
    pipeline = hf.pipeline("image-classification", str(tmp_path / "out"))
    for image, prediction in zip(images, single, strict=True):
        scores = {entry["label"]: entry["score"] for entry in pipeline(image)}
        assert scores == pytest.approx(prediction["scores"], abs=1e-5)


def test_pixels_are_resized_and_normalised(make):
    bundle = ImageClassification().build(make("vit"), LABELS)
    gradient = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    sample = ImageClassification().encode({"image": Image.fromarray(gradient)}, bundle, False)
    values = sample.tensors["pixel_values"]
    np.testing.assert_allclose(values, (gradient / 255 - 0.5).transpose(2, 0, 1) / 0.5, atol=1e-6)


@pytest.mark.parametrize("kind", [*CONFIGS])
def test_image_size(kind, make, images, collate, tmp_path):
    task = ImageClassification(ImageClassification.Options(image_size=48))
    bundle = task.build(make(kind), LABELS)
    samples = [task.encode({"image": image}, bundle, False) for image in images]
    assert {s.tensors["pixel_values"].shape for s in samples} == {(3, 48, 48)}
    prediction = task.decode(bundle.model, collate(samples[:1], {}), bundle)[0]
    bundle.model.save_pretrained(tmp_path / "out")
    bundle.processor.save_pretrained(tmp_path / "out")
    pipeline = hf.pipeline("image-classification", str(tmp_path / "out"))
    scores = {entry["label"]: entry["score"] for entry in pipeline(images[0])}
    assert scores == pytest.approx(prediction["scores"], abs=1e-5)


def test_position_embeddings_are_interpolated(make):
    source = make("vit")
    hf.logging.set_verbosity_error()
    old = ImageClassification().build(source, LABELS)
    new = ImageClassification(ImageClassification.Options(image_size=64)).build(source, LABELS)
    pixels = torch.rand(1, 3, 64, 64)
    new.model.load_state_dict(
        {k: v for k, v in old.model.state_dict().items() if "position_embeddings" not in k}, strict=False
    )
    with torch.no_grad():
        wanted = old.model(pixel_values=pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(new.model(pixel_values=pixels).logits, wanted)
    assert new.model.config.image_size == 64


def test_cropped_margin_keeps_its_share(make):
    source = make("resnet", size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    bundle = ImageClassification(ImageClassification.Options(image_size=64)).build(source, LABELS)
    assert dict(bundle.processor.size) == {"shortest_edge": 72}
    assert dict(bundle.processor.crop_size) == {"height": 64, "width": 64}


def test_images_of_a_batch_have_one_size(make, images):
    task = ImageClassification()
    bundle = task.build(make("resnet", size={"shortest_edge": 32}), LABELS)
    assert "cropped to 32 x 32" in bundle.notes[-1]
    shapes = {task.encode({"image": i}, bundle, True).tensors["pixel_values"].shape for i in images}
    assert shapes == {(3, 32, 32)}


def test_convnext_processor(make, images):
    source = make(
        "convnext", image_processor_type="ConvNextImageProcessor", size={"shortest_edge": 40}, crop_pct=0.875
    )
    for side, options in ((40, {}), (56, {"image_size": 56})):
        task = ImageClassification(ImageClassification.Options(**options))
        bundle = task.build(source, LABELS)
        shapes = {task.encode({"image": i}, bundle, True).tensors["pixel_values"].shape for i in images}
        assert shapes == {(3, side, side)}


def test_processor_that_is_not_available_here(make, images):
    task = ImageClassification()
    strange = task.build(make("resnet", image_processor_type="LeftHandedImageProcessor"), LABELS)
    assert "LeftHandedImageProcessor is not available here" in strange.notes[-1]
    plain = task.build(make("resnet"), LABELS)
    row = {"image": images[0]}
    found, wanted = (task.encode(row, bundle, True).tensors["pixel_values"] for bundle in (strange, plain))
    np.testing.assert_array_equal(found, wanted)


def test_broken_preprocessor_config(make):
    source = make("resnet")
    Path(source, "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        ImageClassification().build(source, LABELS)


def test_multi_label(make, images, collate):
    task = ImageClassification(ImageClassification.Options(problem="multi", class_weights="balanced"))
    task = ImageClassification(task.resolve({"cat": 1, "dog": 2, "owl": 1}))
    bundle = task.build(make("vit"), LABELS)
    data = [{"image": images[0], "label": ["cat", "owl"]}, {"image": images[3], "label": []}]
    batch = collate([task.encode(row, bundle, True) for row in data], {})
    loss, predictions = task.score(bundle.model, batch, bundle)
    weight = torch.tensor([4 / 3, 2 / 3, 4 / 3])
    logits = bundle.model(pixel_values=batch["pixel_values"]).logits
    wanted = F.binary_cross_entropy_with_logits(logits, batch["labels"], weight=weight, reduction="sum")
    torch.testing.assert_close(loss.total, wanted)
    assert float(loss.count) == pytest.approx(2 * 10 / 3)
    meter = task.meter()
    for prediction, row in zip(predictions, data, strict=True):
        meter.update(prediction, row)
    json.dumps(meter.result(), allow_nan=False)


def test_bundle_for_workers_pickles(make, images):
    task = ImageClassification()
    bundle = task.build(make("vit"), LABELS)
    again_task, again = pickle.loads(pickle.dumps((task, bundle)))
    row = {"image": images[0], "label": "dog"}
    for name, value in task.encode(row, bundle, True).tensors.items():
        np.testing.assert_array_equal(value, again_task.encode(row, again, True).tensors[name])
