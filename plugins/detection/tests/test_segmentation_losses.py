"""The loss as a sum and its count, against transformers' own loss and its Trainer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import fasttune
from fasttune.task import Sample, Source
from fasttune.testing import collate
from fasttune_detection.mask_losses import IGNORED
from fasttune_detection.options import SegmentationOptions
from fasttune_detection.segmentation import ImageSegmentation

sys.path.insert(0, str(Path(__file__).parent))
import segmenters

LABELS = ["a", "b", "c"]
KINDS = ("maskformer", "mask2former", "eomt", "eomt_dinov3")


def pixels(images, seed=0):
    """Images of 64 x 64 with a class a pixel, some without truth."""
    chance = np.random.default_rng(seed)
    found = []
    for i in range(images):
        labels = chance.integers(0, 3, (64, 64))
        labels[: 10 * i] = IGNORED
        tensors = {
            "pixel_values": chance.normal(size=(3, 64, 64)).astype(np.float32),
            "size": np.array([64, 64]),
            "labels": labels,
        }
        found.append(Sample(tensors, cost=64 * 64))
    return found


def segments(counts, seed=0):
    """An image of 64 x 64 with rectangles for each number of segments."""
    chance = np.random.default_rng(seed)
    found = []
    for count in counts:
        masks = np.zeros((count, 64, 64), dtype=bool)
        for mask in masks:
            x, y = chance.integers(0, 30, 2)
            mask[y : y + 25, x : x + 30] = True
        tensors = {
            "pixel_values": chance.normal(size=(3, 64, 64)).astype(np.float32),
            "size": np.array([64, 64]),
            "mask_labels": masks,
            "class_labels": chance.integers(0, 3, count),
        }
        found.append(Sample(tensors, cost=64 * 64))
    return found


def inputs_of(some):
    """As a user of transformers makes them."""
    inputs = {"pixel_values": torch.tensor(np.stack([sample.tensors["pixel_values"] for sample in some]))}
    if "labels" in some[0].tensors:
        labels = np.stack([sample.tensors["labels"] for sample in some])
        return {**inputs, "labels": torch.tensor(np.where(labels == IGNORED, 255, labels))}
    masks = [torch.tensor(sample.tensors["mask_labels"], dtype=torch.float32) for sample in some]
    classes = [torch.tensor(sample.tensors["class_labels"]) for sample in some]
    return {**inputs, "mask_labels": masks, "class_labels": classes}


@pytest.fixture
def opened(tmp_path):
    def make(kind, settings=None, **options):
        folder = segmenters.write(tmp_path / kind, kind, **(settings or {}))
        task = ImageSegmentation(SegmentationOptions(**options))
        universal = kind in segmenters.UNIVERSAL
        auto = hf.AutoModelForUniversalSegmentation if universal else hf.AutoModelForSemanticSegmentation
        theirs = auto.from_pretrained(folder)
        if kind.startswith("maskformer"):
            theirs.config.output_hidden_states = True  # transformers 5.23 fails with an auxiliary loss without it
        return task, task.build(Source(folder), LABELS), theirs

    return make


def compare(task, bundle, theirs, some, training):
    bundle.model.train(training)
    theirs.train(training)
    torch.manual_seed(7)
    expected = theirs(**inputs_of(some)).loss
    expected.backward()
    torch.manual_seed(7)
    loss = task.loss(bundle.model, collate(some, bundle.padding))
    (loss.total / loss.count).backward()
    assert float(loss.total.detach()) / loss.count == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert gradients
    for name, parameter in bundle.model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-5, msg=name)
    return loss


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", sorted(segmenters.PER_PIXEL))
def test_the_loss_of_pixels_is_that_of_transformers(opened, kind, training):
    """With its auxiliary head, where it has one; dropout draws the same, from the same numbers."""
    task, bundle, theirs = opened(kind)
    some = pixels(3)
    loss = compare(task, bundle, theirs, some, training)
    assert loss.count == sum((sample.tensors["labels"] != IGNORED).sum() for sample in some)
    assert bool(loss.parts) == (getattr(theirs, "auxiliary_head", None) is not None)


@pytest.mark.parametrize("kind", sorted(segmenters.PER_PIXEL))
def test_a_batch_of_one_image_trains(opened, kind):
    """Heads that pool the image normalise one value over the batch, which torch refuses; it has the loss of two
    that are equal."""
    task, bundle, _ = opened(kind)
    for module in bundle.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bundle.model.train()
    (sample,) = pixels(1)
    one = task.loss(bundle.model, collate([sample], bundle.padding))
    one.total.backward()
    two = task.loss(bundle.model, collate([sample, sample], bundle.padding))
    assert one.count == two.count / 2
    assert float(one.total.detach()) == pytest.approx(float(two.total.detach()) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_segments_is_that_of_transformers(opened, kind):
    """In training the points are drawn from the same numbers; an image has no segment."""
    counts = (3, 0, 5, 2)
    task, bundle, theirs = opened(kind, segments_per_image=float(np.mean(counts)))
    loss = compare(task, bundle, theirs, segments(counts), training=True)
    assert loss.count == sum(counts)
    assert set(loss.parts) == {"loss_cross_entropy", "loss_mask", "loss_dice"}


def test_an_evaluated_loss_without_points_is_that_of_transformers(opened):
    counts = (3, 1, 0, 2)
    task, bundle, theirs = opened("maskformer", segments_per_image=float(np.mean(counts)))
    compare(task, bundle, theirs, segments(counts), training=False)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_segments_add_up(opened, kind):
    task, bundle, _ = opened(kind)
    empty, full = segments((0, 0)), segments((2, 3), seed=1)
    with torch.no_grad():
        losses = [task.loss(bundle.model, collate(some, bundle.padding)) for some in (empty, full, empty + full)]
    assert [loss.count for loss in losses] == [0, 5, 5]
    assert float(losses[0].total) > 0
    assert float(losses[0].total + losses[1].total) == pytest.approx(float(losses[2].total), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(0, 0), (14, 2)], ids=["none", "more than queries"])
def test_a_batch_without_segments_and_one_with_too_many_train(opened, kind, counts):
    task, bundle, _ = opened(kind)
    bundle.model.train()
    loss = task.loss(bundle.model, collate(segments(counts), bundle.padding))
    loss.total.backward()
    assert float(loss.total.detach()) > 0
    assert all(p.grad.isfinite().all() for p in bundle.model.parameters() if p.grad is not None)
    assert bundle.model.class_predictor.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["mask2former", "eomt"])
def test_an_evaluation_is_the_same_again_and_leaves_the_generator_alone(opened, kind):
    task, bundle, _ = opened(kind)
    batch = collate(segments((2, 3)), bundle.padding)
    with torch.no_grad():
        first = float(task.loss(bundle.model, batch).total)
        torch.manual_seed(5)
        again = float(task.loss(bundle.model, batch).total)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(3))
        assert again == first
        bundle.model.train()
        assert float(task.loss(bundle.model, batch).total) != first


class Recorded(torch.utils.data.Dataset):
    def __init__(self, some):
        self.some = some

    def __len__(self):
        return len(self.some)

    def __getitem__(self, index):
        return self.some[index]


def write_rows(folder, count):
    """Pictures of two coloured rectangles on grey, and their masks: as ids, and as objects."""
    folder.mkdir()
    lines = []
    for i in range(count):
        chance = np.random.default_rng(i)
        values = np.full((64, 64, 3), 128, dtype=np.uint8)
        ids = np.zeros((64, 64), dtype=np.uint8)
        polygons = []
        for number, colour in ((1, (220, 40, 30)), (2, (30, 60, 220))):
            x, y = (int(edge) for edge in chance.integers(0, 40, 2))
            values[y : y + 20, x : x + 20], ids[y : y + 20, x : x + 20] = colour, number
            polygons.append([x, y, x + 20, y, x + 20, y + 20, x, y + 20])
        Image.fromarray(values).save(folder / f"{i}.png")
        Image.fromarray(ids).save(folder / f"{i}-mask.png")
        objects = {"masks": polygons, "labels": ["b", "c"]}
        lines.append({"image": f"{i}.png", "mask": f"{i}-mask.png", "objects": objects})
    return lines


# At higher rates rounding grows, in batch norms and in what is matched, until the two part.
RATES = {"segformer": 0.01, "mask2former": 0.3}


@pytest.mark.parametrize("kind", ["segformer", "mask2former"])
def test_thirty_losses_are_those_of_transformers_trainer(monkeypatch, tmp_path, kind):
    """All pictures in one batch. Mask2Former's points are the same for every mask here: they would be drawn in the
    order of the batch, which differs."""
    points = torch.rand(512, 2, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: points[: shape[-2]].expand(shape).contiguous())
    folder = segmenters.write(tmp_path / "model", kind, classes=3 if kind == "segformer" else 2)
    semantic = kind == "segformer"
    lines = write_rows(tmp_path / "rows", 8)
    path = tmp_path / "rows" / "rows.jsonl"
    kept = ("image", "mask") if semantic else ("image", "objects")
    path.write_text("".join(json.dumps({name: line[name] for name in kept}) + "\n" for line in lines))
    options = {"kind": "semantic", "classes": dict(enumerate("abc"))} if semantic else {"kind": "instance"}
    fasttune.finetune(
        task="image-segmentation",
        model=folder,
        data={"train": str(path), "valid": str(path)},
        options=options,
        strategy="full",
        train={
            "steps": 30,
            "batch": 8,
            "lr": RATES[kind],
            "head_lr": RATES[kind],
            "clip": 0.01 if kind == "mask2former" else 1.0,
            "precision": "fp32",
            "optimizer": {"kind": "sgd", "momentum": 0.0},
            "schedule": {"kind": "constant", "warmup": 0},
            "seed": 17,
        },
        eval={"every": 30},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [step["loss"] for step in steps if "loss" in step]

    task = ImageSegmentation(SegmentationOptions(**options, segments_per_image=2.0))
    bundle = task.build(Source(folder), list("abc") if semantic else ["b", "c"])
    some = []
    for line in lines:
        row = {"image": Image.open(path.parent / line["image"])}
        row |= {"mask": Image.open(path.parent / line["mask"])} if semantic else {"objects": line["objects"]}
        some.append(task.encode(row, bundle, True))
    auto = hf.AutoModelForSemanticSegmentation if semantic else hf.AutoModelForUniversalSegmentation
    model = auto.from_pretrained(folder)
    lr = RATES[kind]
    groups = [{"params": [p], "lr": lr * rate_of(name, bundle.rates)} for name, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups)
    trainer = hf.Trainer(
        model,
        hf.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=30,
            per_device_train_batch_size=8,
            max_grad_norm=0.01 if kind == "mask2former" else 1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=Recorded(some),
        data_collator=inputs_of,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == len(theirs) == 30
    assert found[-1] < 0.95 * found[0], "losses that stay where they are prove nothing"
    assert found == pytest.approx(theirs, rel=5e-3)
    assert found[:5] == pytest.approx(theirs[:5], rel=2e-5)


def rate_of(name, rates):
    return rates.get(max((module for module in rates if name.startswith(f"{module}.")), key=len, default=""), 1.0)
