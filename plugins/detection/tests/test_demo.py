"""The demo's pictures of digits, the embedded model, and what the two are said to be."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits

import fasttune_detection
from fasttune.cli import main
from fasttune.task import Source
from fasttune.testing import check_demo_model
from fasttune_detection import demo
from fasttune_detection.demo import digits
from fasttune_detection.options import DetectionOptions
from fasttune_detection.task import ObjectDetection

MODEL = Path(fasttune_detection.__file__).parent / "demo" / "model"
COMPARED = ["before", "from scratch", "head", "lora", "full"]


@pytest.mark.parametrize("seed", range(5))
def test_boxes_are_where_the_ink_ends(seed):
    """Whatever the writing changed lies in a box, and each of the four edges of a box has some of it."""
    chance = np.random.default_rng(seed)
    inks, _ = digits.load("train")
    paper = digits.sheet(chance)
    picture, boxes = digits.write(paper, list(inks[:6]), chance)
    ink = (np.asarray(picture) != np.asarray(paper)).any(axis=2)
    found = [box for box in boxes if box]
    assert found
    boxed = np.zeros_like(ink)
    for left, top, right, bottom in found:
        part = ink[top:bottom, left:right]
        assert part.shape == (bottom - top, right - left), "inside the picture"
        assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))
        boxed[top:bottom, left:right] = True
    assert not (ink & ~boxed).any()


def test_a_digit_without_room_is_left_out_with_its_box():
    chance = np.random.default_rng(0)
    inks, _ = digits.load("valid")
    _, boxes = digits.write(digits.sheet(chance), list(inks[:60]), chance)
    assert boxes[0]
    assert None in boxes
    found = [box for box in boxes if box]
    shares = [digits._overlap(one, other) for i, one in enumerate(found) for other in found[:i]]
    assert max(shares) <= 0.1


def test_rows_follow_from_the_seed_alone():
    one, same, other = (digits.rows("valid", 12, seed) for seed in (3, 3, 4))
    assert [row["objects"] for row in one] == [row["objects"] for row in same]
    assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in zip(one, same, strict=True))
    assert one[0]["objects"] != other[0]["objects"]
    assert {row["image"].size for row in one} == {digits.SIZE}
    assert all(len(row["objects"]["boxes"]) == len(row["objects"]["labels"]) >= 1 for row in one)


def test_no_digit_and_no_form_is_on_two_sides():
    target = load_digits().target.tolist()
    borders = [digits.SIDES[side].indices(len(target))[:2] for side in ("pretraining", "train", "valid")]
    assert [start for start, _ in borders] == [0, *(stop for _, stop in borders[:-1])]
    assert borders[-1][1] == len(target)
    assert all(target[start : start + 30] == [*range(10)] * 3 for start, _ in borders), "a form begins so"
    assert sum(len(digits.load(side)[0]) for side in digits.SIDES) == len(target)


def test_the_model_is_small_and_says_how_it_was_made():
    check_demo_model(MODEL, "pretrain_detector.py")
    assert json.loads((MODEL / "config.json").read_text())["model_type"] == "rt_detr"


def test_the_model_finds_digits_that_it_never_saw():
    """By the classes that it was pretrained with; the demo's are named otherwise, and begin with new layers."""
    task = ObjectDetection(DetectionOptions(threshold=0.0))
    bundle = task.build(Source(MODEL), [f"digit {i}" for i in range(10)])
    assert "head kept: 10 classes" in bundle.notes[0]
    meter = task.meter()
    for row in digits.rows("valid", 24, 0):
        row["objects"]["labels"] = [f"digit {label}" for label in row["objects"]["labels"]]
        sample = task.encode({"image": row["image"]}, bundle, train=False)
        batch = {name: torch.from_numpy(tensor)[None] for name, tensor in sample.tensors.items()}
        with torch.no_grad():
            (prediction,) = task.decode(bundle.model, batch, bundle)
        meter.update(prediction, row)
    assert meter.result()["mAP"] > 0.5
    notes = task.build(Source(MODEL), [str(i) for i in range(10)]).notes
    assert any("class layers replaced" in note and "box layers kept" in note for note in notes)


def test_the_demo_compares_and_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "TRAIN", 12)
    monkeypatch.setattr(demo, "VALID", 6)
    monkeypatch.setattr(demo, "SETTINGS", {name: {**train, "epochs": 1} for name, train in demo.SETTINGS.items()})
    result = CliRunner().invoke(main, ["demo", "object-detection", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    shown = {line[:18].strip(): line.split() for line in result.output.splitlines()[4:9]}
    assert list(shown) == COMPARED
    assert float(shown["before"][-2]) < 0.1, "its classes are new"
    picture = Image.open(tmp_path / "demo.png")
    assert np.asarray(picture).std() > 20, "not blank"
    assert f"picture: {tmp_path / 'demo.png'}" in result.output
    rows = [json.loads(line) for line in (tmp_path / "valid.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"valid/{i:06d}.png" for i in range(1, 7)]
    assert Image.open(tmp_path / rows[0]["image"]).size == digits.SIZE


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = CliRunner().invoke(main, ["demo", "object-detection"])
    assert result.exit_code == 2
    assert "pip install scikit-learn" in result.output
