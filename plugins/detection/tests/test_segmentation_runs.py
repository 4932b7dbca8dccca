"""Whole runs of segmentation: every kind and strategy, and what a run leaves opens elsewhere."""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import transformers as hf
import yaml
from click.testing import CliRunner
from PIL import Image

import fasttune
from fasttune.cli import main
from fasttune_detection.segments import from_rle

sys.path.insert(0, str(Path(__file__).parent))
import segmenters

TRAIN = {"steps": 4, "batch": 4, "precision": "fp32"}
COLOURS = {"blue": (30, 60, 220), "red": (220, 40, 30)}
SIZES = ((96, 64), (64, 96), (130, 70))


def shapes(index):
    """(picture, ids, objects) of one to three rectangles on grey."""
    chance = np.random.default_rng(index)
    width, height = SIZES[index % 3]
    values = np.full((height, width, 3), 128, dtype=np.uint8)
    ids = np.zeros((height, width), dtype=np.uint8)
    objects = []
    for number in range(1 + index % 3):
        name = sorted(COLOURS)[(index + number) % 2]
        x, y = (int(chance.integers(0, side - 30)) for side in (width, height))
        values[y : y + 24, x : x + 28], ids[y : y + 24, x : x + 28] = (
            COLOURS[name],
            1 + sorted(COLOURS).index(name),
        )
        objects.append((name, [x, y, x + 28, y, x + 28, y + 24, x, y + 24]))
    return Image.fromarray(values), Image.fromarray(ids), objects


@pytest.fixture
def mask_folder(tmp_path):
    """Pictures in images/, masks of ids in masks/, classes in classes.txt."""
    folder = tmp_path / "masks"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(10):
        picture, ids, _ = shapes(i)
        picture.save(folder / "images" / f"{i}.png")
        ids.save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("ground\nblue\nred\n")
    return folder


@pytest.fixture
def coco_file(tmp_path):
    folder = tmp_path / "coco"
    folder.mkdir()
    document = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(sorted(COLOURS))]
    for i in range(10):
        picture, _, objects = shapes(i)
        picture.save(folder / f"{i}.png")
        document["images"].append(
            {"id": i, "file_name": f"{i}.png", "width": picture.width, "height": picture.height}
        )
        for name, polygon in objects if i != 4 else ():
            x, y, width, height = polygon[0], polygon[1], 28, 24
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": i,
                    "category_id": 3 + 4 * sorted(COLOURS).index(name),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
    path = folder / "instances.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def run(mask_folder, coco_file, tmp_path):
    """run(model kind, strategy, kind=..., **settings): (report, the folder of best/)."""

    def train(model, strategy, kind="semantic", options=None, **settings):
        data = str(mask_folder if kind == "semantic" else coco_file)
        background = {"background": "ground"} if kind == "panoptic" else {}
        report = fasttune.finetune(
            task="image-segmentation",
            model=segmenters.write(tmp_path / "model", model),
            data={"train": data, "valid": data},
            options={"kind": kind, **background, **(options or {})},
            strategy=strategy,
            output=str(tmp_path / "run"),
            quiet=True,
            **{"train": TRAIN, "eval": {"batch": 1}, **settings},
        )
        return report, tmp_path / "run" / "best"

    return train


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    found = []
    for i in range(4):
        shapes(i)[0].save(folder / f"{i}.png")
        found.append(folder / f"{i}.png")
    return found


def pipeline_of(best):
    return hf.pipeline("image-segmentation", str(best), device="cpu")


def predicted(best, picture):
    (found,) = fasttune.load(best.parent).predict([{"image": str(picture)}])
    return [{**segment, "mask": from_rle(segment["mask"])} for segment in found["segments"]]


def mask_of(entry):
    return np.asarray(entry["mask"]) > 0


@pytest.mark.parametrize("model", [*segmenters.PER_PIXEL, *segmenters.UNIVERSAL])
def test_semantic_masks_are_those_of_a_pipeline(run, pictures, model):
    """Pictures of several shapes, resized by pipeline and run alike."""
    report, best = run(model, "full")
    assert report.metrics["steps"] == 4
    assert 0 <= report.metrics["valid"]["mIoU"] <= 1
    pipeline = pipeline_of(best)
    for picture in pictures[:3]:
        expected = {entry["label"]: mask_of(entry) for entry in pipeline(str(picture), subtask="semantic")}
        found = {segment["label"]: segment["mask"] for segment in predicted(best, picture)}
        assert found.keys() == expected.keys()
        for label, mask in found.items():
            np.testing.assert_array_equal(mask, expected[label])


CLOSE = 1e-5  # of scores: a pipeline samples in another order of sums than our deformable attention


@pytest.mark.parametrize("model", ["maskformer", "mask2former", "eomt"])
def test_instances_are_those_of_a_pipeline(run, pictures, model):
    """A pipeline paints one mask over the other: ours hold what it shows, and together as much."""
    report, best = run(model, "full", kind="instance", options={"threshold": 0.05})
    assert "mAP" in report.metrics["valid"]
    pipeline = pipeline_of(best)
    for picture in pictures[:3]:
        shown = pipeline(str(picture), subtask="instance", threshold=0.05)
        found = predicted(best, picture)
        for label in {segment["label"] for segment in (*found, *shown)}:
            ours, theirs = (sorted(s["score"] for s in some if s["label"] == label) for some in (found, shown))
            assert ours == pytest.approx(theirs, abs=CLOSE)
        assert found == sorted(found, key=lambda segment: -segment["score"])
        left = list(found)
        for entry in shown:
            near = [s for s in left if s["score"] == pytest.approx(entry["score"], abs=CLOSE)]
            same = [s for s in near if not (mask_of(entry) & ~s["mask"]).any()]
            assert same, "a pipeline's mask lies in none of ours"
            left = [segment for segment in left if segment is not same[0]]
        covered = np.any([segment["mask"] for segment in found], axis=0)
        np.testing.assert_array_equal(covered, np.any([mask_of(entry) for entry in shown], axis=0))
        for segment in found:
            rows, columns = np.nonzero(segment["mask"])
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert segment["box"] == expected


@pytest.mark.parametrize("model", ["maskformer", "mask2former", "eomt"])
def test_panoptic_segments_are_those_of_a_pipeline(run, pictures, model):
    """But for stuff, which a pipeline leaves in pieces."""
    report, best = run(model, "full", kind="panoptic", options={"threshold": 0.1, "stuff": ["ground"]})
    assert "PQ" in report.metrics["valid"]
    pipeline = pipeline_of(best)
    for picture in pictures[:3]:
        shown = pipeline(
            str(picture), subtask="panoptic", threshold=0.1, overlap_mask_area_threshold=0.8
        )  # the overlap is DETR's; the pipeline's own is 0.5
        found = predicted(best, picture)
        stuff = [segment for segment in found if segment["label"] == "ground"]
        pieces = [mask_of(entry) for entry in shown if entry["label"] == "ground"]
        assert len(stuff) == min(1, len(pieces))
        if stuff:
            np.testing.assert_array_equal(stuff[0]["mask"], np.any(pieces, axis=0))
        things = {(s["label"], s["mask"].tobytes()): s["score"] for s in found if s["label"] != "ground"}
        assert things == pytest.approx(
            {(s["label"], mask_of(s).tobytes()): s["score"] for s in shown if s["label"] != "ground"}, abs=CLOSE
        )
        assert np.sum([segment["mask"] for segment in found], axis=0).max(initial=0) <= 1, "segments overlap"


@pytest.mark.parametrize(
    "model", ["segformer", "upernet_swin", "beit", "data2vec", "dpt", "maskformer", "mask2former", "eomt"]
)
def test_an_adapter_opens_in_peft_and_is_merged(run, tmp_path, pictures, model):
    _, best = run(model, {"kind": "lora", "rank": 4})
    universal = model in segmenters.UNIVERSAL
    auto = hf.AutoModelForUniversalSegmentation if universal else hf.AutoModelForSemanticSegmentation
    base = auto.from_pretrained(
        tmp_path / "model", config=hf.AutoConfig.from_pretrained(best), ignore_mismatched_sizes=True
    )
    adapted = peft.PeftModel.from_pretrained(base, best).merge_and_unload().eval()
    processor = hf.AutoImageProcessor.from_pretrained(best, backend="pil")
    pipeline = hf.pipeline("image-segmentation", model=adapted, image_processor=processor, device="cpu")
    done = CliRunner().invoke(main, ["export", str(best.parent), "--to", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    for opened in (pipeline, pipeline_of(tmp_path / "merged")):
        expected = {entry["label"]: mask_of(entry) for entry in opened(str(pictures[0]), subtask="semantic")}
        found = {segment["label"]: segment["mask"] for segment in predicted(best, pictures[0])}
        labels = {*found, *expected}
        empty = np.zeros_like(next(iter(found.values())))
        turned = sum((found.get(label, empty) != expected.get(label, empty)).mean() for label in labels)
        assert turned < 2e-3, "merged, weights are rounded once more: a few pixels near an edge may turn"


@pytest.mark.parametrize("model", ["segformer", "upernet_resnet", "mask2former", "eomt"])
def test_a_head_is_trained_on_a_frozen_base(run, tmp_path, model):
    import torch

    _, best = run(model, "head")
    universal = model in segmenters.UNIVERSAL
    auto = hf.AutoModelForUniversalSegmentation if universal else hf.AutoModelForSemanticSegmentation
    before = auto.from_pretrained(tmp_path / "model").state_dict()
    after = auto.from_pretrained(best).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    parts = ("class_predictor", "mask_") if universal else ("decode_head", "auxiliary_head")
    assert all(any(part in name for part in parts) for name in changed), changed


@pytest.mark.parametrize("model", [*segmenters.PER_PIXEL, *segmenters.UNIVERSAL])
def test_bf16_trains_too(run, model):
    report, best = run(model, "full", train={**TRAIN, "precision": "bf16"})
    steps = [json.loads(line) for line in (best.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert all(step["taken"] for step in steps if "loss" in step)
    assert np.isfinite(report.metrics["valid"]["loss"])


@pytest.mark.parametrize("model", ["segformer", "mask2former", "maskformer_resnet"])
def test_random_weights_train(run, model):
    report, _ = run(model, "full", weights="random")
    assert report.metrics["valid"]["loss"] > 0


@pytest.mark.parametrize(
    ("model", "kind", "steps", "metric", "least"),
    [("segformer", "semantic", 80, "mIoU", 0.7), ("eomt", "instance", 200, "mAP50", 0.5)],
)
def test_shapes_are_learned(run, model, kind, steps, metric, least):
    train = {"steps": steps, "batch": 5, "lr": 3e-3, "head_lr": 3e-3, "precision": "fp32"}
    report, _ = run(model, "full", kind, train=train, eval={"every": steps, "batch": 1}, weights="random")
    assert report.metrics["valid"][metric] > least


def test_stuff_is_what_panoptic_data_say(tmp_path):
    """COCO's panoptic file: ground is stuff, squares are things."""
    folder = tmp_path / "panoptic"
    (folder / "masks").mkdir(parents=True)
    document = {"images": [], "annotations": []}
    names = ["ground", *sorted(COLOURS)]
    document["categories"] = [{"id": 7 + i, "name": name, "isthing": int(i > 0)} for i, name in enumerate(names)]
    for i in range(8):
        picture, ids, _ = shapes(i)
        picture.save(folder / f"{i}.png")
        # ids of segments are those of classes, shifted: one object a class here
        numbers = np.asarray(ids).astype(np.uint8) + 40
        coloured = np.stack([numbers, np.zeros_like(numbers), np.zeros_like(numbers)], axis=-1)
        Image.fromarray(coloured).save(folder / "masks" / f"{i}.png")
        size = {"width": picture.width, "height": picture.height}
        document["images"].append({"id": i, "file_name": f"{i}.png", **size})
        found = [{"id": n, "category_id": n - 33, "iscrowd": 0} for n in np.unique(numbers).tolist()]
        document["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": found})
    path = folder / "panoptic.json"
    path.write_text(json.dumps(document))
    report = fasttune.finetune(
        task="image-segmentation",
        model=segmenters.write(tmp_path / "model", "maskformer_resnet"),
        data={"train": str(path), "valid": str(path)},
        options={"kind": "panoptic", "threshold": 0.0},
        strategy="full",
        train=TRAIN,
        output=str(tmp_path / "run"),
        quiet=True,
    )
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["options"]["stuff"] == ["ground"]
    found = report.metrics["valid"]
    assert 0 <= found["PQ"] <= 1
    assert {"PQ_things", "PQ_stuff"} <= found.keys()
    assert not found["per_class"]["ground"]["thing"]
    assert found["per_class"]["blue"]["thing"]


def test_a_run_with_augmentation_is_the_same_again_in_any_worker(mask_folder, tmp_path):
    losses = []
    model, data = segmenters.write(tmp_path / "model", "segformer"), str(mask_folder)
    for name, workers, augment in (("one", 0, {}), ("two", 2, {}), ("none", 0, None)):
        fasttune.finetune(
            task="image-segmentation",
            model=model,
            data={"train": data, "valid": data, "workers": workers},
            options={"augment": augment},
            strategy="full",
            train=TRAIN,
            output=str(tmp_path / name),
            quiet=True,
        )
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1] != losses[2]


def invoke(*arguments):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(("model", "kind"), [("segformer", "semantic"), ("mask2former", "instance")])
def test_the_command_line_on_masks_and_on_coco(mask_folder, coco_file, pictures, tmp_path, model, kind):
    data = mask_folder if kind == "semantic" else coco_file
    model = segmenters.write(tmp_path / "model", model)
    shared = ("image-segmentation", "--data", data, "--valid", data, "--model", model)
    shared += ("--set", f"options.kind={kind}", "--set", "train.steps=2", "--set", "train.batch=4")
    shared += ("--set", "strategy.kind=full", "--output", tmp_path / "run")
    said = invoke("check", *shared, "--draw", tmp_path / "sheet.png")
    assert "seen as 64 x 64" in said
    assert min(Image.open(tmp_path / "sheet.png").size) > 64
    invoke("run", *shared)
    said = invoke("evaluate", tmp_path / "run", "--data", data, "--json")
    assert ("mIoU" if kind == "semantic" else "mAP") in json.loads(said)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": str(picture)}) + "\n" for picture in pictures))
    said = invoke("predict", tmp_path / "run", "--data", rows, "--draw", tmp_path / "drawn")
    assert len([json.loads(line) for line in said.splitlines() if line.startswith("{")]) == len(pictures)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == len(pictures)
