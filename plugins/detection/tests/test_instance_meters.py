"""Mask mAP against pycocotools, whatever the order and the split."""

import contextlib
import io
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasttune_detection.segment_meters import InstanceMeter
from fasttune_detection.segments import Reading, to_rle

TOLERANCE = 1e-6  # as the issue asks; means of the same numbers are taken in another order
INSTANCE = Reading("instance")
KINDS = [f"class {i}" for i in range(6)]
METRICS = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "mAR1", "mAR10", "mAR100")
METRICS += ("mAR_small", "mAR_medium", "mAR_large")  # as pycocotools lists them


def scored(pairs):
    meter = InstanceMeter(INSTANCE)
    for prediction, row in pairs:
        meter.update(prediction, row)
    return meter


def merged(pairs, order):
    """Three ranks' meters, as they travel, joined in this order; each saw its rows in another one."""
    pairs = list(pairs)
    random.Random(3).shuffle(pairs)
    ranks = [pickle.loads(pickle.dumps(scored(pairs[i::3]))) for i in range(3)]
    whole = InstanceMeter(INSTANCE)
    for i in order:
        whole.merge(ranks[i])
    return whole


def painted(size, masks):
    """A prediction. masks: (label, score, bool [h, w])."""
    segments = [{"label": label, "score": score, "mask": to_rle(mask)} for label, score, mask in masks]
    return {"size": list(size), "segments": segments}


def blob(shape, chance, side):
    """An ellipse somewhere, perhaps cut at the edge, never empty."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    y, x = chance.uniform(0, height), chance.uniform(0, width)
    high, wide = chance.uniform(0.3, 1, 2) * side
    mask = ((rows + 0.5 - y) / high) ** 2 + ((columns + 0.5 - x) / wide) ** 2 < 1
    mask[min(int(y), height - 1), min(int(x), width - 1)] = True
    return mask


def pictures(count, seed, *, levels=None, crowds=0.1, areas=False):
    """(prediction, row) as a half-trained model leaves them: shifted masks, wrong classes, double and missing
    ones, more than a hundred of a class. areas: rows state some, which decide the sizes."""
    chance = np.random.default_rng(seed)
    for number in range(count):
        shape = tuple(chance.integers(120, 260, 2))
        truths = int(chance.integers(1, 7)) if chance.random() > 0.15 else 0
        masks = [blob(shape, chance, float(np.exp(chance.uniform(1, 5)))) for _ in range(truths)]
        labels = chance.choice(KINDS[:-1], truths).tolist()  # the last one is predicted only
        found = []
        for mask, label in zip(masks * 2, labels * 2, strict=True):
            if chance.random() < 0.7:
                moved = np.roll(mask, chance.integers(-2, 3, 2), (0, 1))
                found.append((label if chance.random() < 0.8 else str(chance.choice(KINDS)), moved))
        if number % 15 == 7:
            found += [(KINDS[0], blob(shape, chance, 6)) for _ in range(120)]
        if number % 15 == 8:
            found.append((KINDS[0], np.zeros(shape, bool)))  # the model thinks of one, and paints nothing
        scores = chance.random(len(found))
        scores = scores if levels is None else (scores * levels).astype(int) / levels
        objects = {
            "masks": [to_rle(mask) for mask in masks],
            "labels": labels,
            "crowd": (chance.random(truths) < crowds).tolist(),
        }
        if areas:
            stated = chance.uniform(100, 20000, truths)
            objects["area"] = [None if chance.random() < 0.3 else area for area in stated.tolist()]
        prediction = painted(
            shape[::-1],
            [(label, score, mask) for (label, mask), score in zip(found, scores.tolist(), strict=True)],
        )
        yield prediction, {"image": f"images/page {number}.png", "objects": objects}


def official(pairs, iou_type="segm"):
    """pycocotools' twelve numbers and AP by class; images numbered in the order given."""
    ids = {name: i for i, name in enumerate(KINDS)}
    truths, found = [], []
    for number, (prediction, row) in enumerate(pairs, start=1):
        objects = row["objects"]
        areas = objects.get("area") or [None] * len(objects["labels"])
        for mask, label, crowd, area in zip(
            objects["masks"], objects["labels"], objects["crowd"], areas, strict=True
        ):
            area = float(coco_masks.area(mask)) if area is None else area
            one = {"id": len(truths) + 1, "image_id": number, "category_id": ids[label], "segmentation": mask}
            truths.append({**one, "area": area, "iscrowd": int(crowd), "bbox": coco_masks.toBbox(mask).tolist()})
        for segment in prediction["segments"]:
            one = {"image_id": number, "category_id": ids[segment["label"]], "score": segment["score"]}
            if iou_type == "segm":
                found.append({**one, "segmentation": segment["mask"]})
            else:
                found.append({**one, "bbox": coco_masks.toBbox(segment["mask"]).tolist()})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        sizes = [prediction["size"] for prediction, _ in pairs]
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "width": w, "height": h} for i, (w, h) in enumerate(sizes, start=1)],
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
            "annotations": truths,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    whole = {name: None if value == -1 else value for name, value in zip(METRICS, evaluation.stats, strict=True)}
    classes = {}
    for name, i in ids.items():
        table = evaluation.eval["precision"][:, :, evaluation.params.catIds.index(i), 0, -1]
        if table.max() > -1:
            classes[name] = table.mean()
    return whole, classes


@pytest.mark.parametrize("levels", [None, 10, 1], ids=["any score", "ten scores", "all equal"])
@pytest.mark.parametrize("crowds", [0.0, 0.25])
@pytest.mark.parametrize("areas", [False, True])
def test_instances_equal_pycocotools(levels, crowds, areas):
    pairs = list(pictures(60, 5, levels=levels, crowds=crowds, areas=areas))
    assert sum(not row["objects"]["masks"] for _, row in pairs) > 3
    result = scored(pairs).result()
    whole, classes = official(pairs)
    assert 0.05 < result["mAP"] < 0.95
    assert set(result) == {*METRICS, "per_class", "box_mAP"}
    for name in METRICS:
        assert result[name] == (None if whole[name] is None else pytest.approx(whole[name], abs=TOLERANCE)), name
    assert None not in whole.values()
    assert {name: held["AP"] for name, held in result["per_class"].items()} == pytest.approx(
        classes, abs=TOLERANCE
    )
    boxes, _ = official(pairs, "bbox")
    assert result["box_mAP"] == pytest.approx(boxes["mAP"], abs=TOLERANCE)
    assert abs(boxes["mAP"] - whole["mAP"]) > 1e-3  # else the two could be one
    json.dumps(result, allow_nan=False)


def test_stated_areas_matter_here():
    """Else the test above would show nothing of them."""
    first, second = (official(list(pictures(60, 5, areas=areas)))[0] for areas in (False, True))
    assert abs(first["mAP_small"] - second["mAP_small"]) > 10 * TOLERANCE


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("paths", [True, False])
def test_instances_order_and_split_do_not_matter(levels, paths):
    pairs = list(pictures(30, 6, levels=levels))
    if not paths:
        pairs = [(prediction, {"objects": row["objects"]}) for prediction, row in pairs]
    whole = scored(pairs).result()
    for order in ((0, 1, 2), (2, 0, 1)):
        assert merged(pairs, order).result() == whole


def test_images_that_differ_in_masks_alone_have_an_order():
    """Same boxes, areas and scores, right and wrong by turns, and no path: the runs of the masks decide."""
    half = np.zeros((20, 20), bool)
    half[5:15, 5:15] = np.arange(10) < np.arange(10)[:, None]
    other = half.copy()
    other[5:15, 5:15] = half[5:15, 5:15].T  # of the same area, and its box after a corner is added to both
    half[5, 14] = half[5, 5] = half[14, 5] = half[14, 14] = True
    other[5, 14] = other[5, 5] = other[14, 5] = other[14, 14] = True
    row = {"objects": {"masks": [to_rle(half)], "labels": ["a"]}}
    pairs = [(painted((20, 20), [("a", 0.5, [half, other][i % 2])]), row) for i in range(12)]
    results = [scored(some).result() for some in (pairs, pairs[::-1], pairs[::2] + pairs[1::2])]
    assert results[0] == results[1] == results[2]
    assert 0 < results[0]["mAP"] < 1


def test_instances_keep_runs_and_no_pixels():
    """A mask of a million pixels is kept in a hundred bytes."""
    mask = np.zeros((1000, 1000), bool)
    mask[100:900, 100:900] = True
    row = {"objects": {"masks": [to_rle(mask)], "labels": ["class 0"]}}
    meter = scored([(painted((1000, 1000), [("class 0", 0.9, mask)]), row)] * 3)
    assert len(pickle.dumps(meter)) < 20_000
    assert meter.result()["mAP"] == 1


def test_instances_of_a_panoptic_mask():
    ids = np.zeros((20, 30), np.uint8)
    ids[2:10, 2:10], ids[12:18, 5:25], ids[0:2] = 1, 2, 3
    segments = [{"id": 1, "label": "car"}, {"id": 2, "label": "car"}, {"id": 3, "label": "sky", "thing": False}]
    row = {"mask": Image.fromarray(ids), "objects": {"segments": segments}}
    found = painted((30, 20), [("car", 0.9, ids == 1), ("car", 0.8, ids == 2)])
    result = scored([(found, row)]).result()
    assert result["mAP"] == 1
    assert result["per_class"]["car"]["objects"] == 2
    assert "sky" not in result["per_class"]


@pytest.mark.parametrize(
    ("segment", "said"),
    [
        ({"score": float("nan"), "mask": to_rle(np.ones((2, 3), bool))}, "finite"),
        ({"score": 0.5, "mask": to_rle(np.ones((3, 2), bool))}, "3 x 2 has a mask of"),
    ],
)
def test_broken_instances_are_refused(segment, said):
    row = {"objects": {"masks": [], "labels": []}}
    with pytest.raises(ValueError, match=said):
        InstanceMeter(INSTANCE).update({"size": [3, 2], "segments": [{"label": "car", **segment}]}, row)


def test_nothing_is_printed_and_no_torch_needed(capfd):
    scored(pictures(3, 2)).result()
    assert capfd.readouterr() == ("", "")
    code = (
        "import sys, fasttune_detection.segment_meters\nprint(*{'torch', 'cv2', 'pycocotools'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
