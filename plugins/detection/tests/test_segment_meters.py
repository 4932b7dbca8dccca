"""mIoU against scikit-learn, mask mAP against pycocotools, panoptic quality against its definition."""

import contextlib
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from fasttune.errors import DataError
from fasttune_detection.segment_meters import InstanceMeter, PanopticMeter, SemanticMeter, meter_of
from fasttune_detection.segments import Reading, to_rle

CLASSES = ["sky", "road", "tree", "car", "boat"]
VOID = 255
TOLERANCE = 1e-6  # as the issue asks; means of the same numbers are taken in another order


def scored(pairs, reading):
    meter = meter_of(reading)
    for prediction, row in pairs:
        meter.update(prediction, row)
    return meter


def merged(pairs, reading, order):
    """Three ranks' meters, as they travel, joined in this order; each saw its rows in another one."""
    pairs = list(pairs)
    random.Random(3).shuffle(pairs)
    ranks = [pickle.loads(pickle.dumps(scored(pairs[i::3], reading))) for i in range(3)]
    whole = meter_of(reading)
    for i in order:
        whole.merge(ranks[i])
    return whole


def painted(size, masks, **more):
    """A prediction. masks: (label, bool [h, w]) or (label, score, bool [h, w])."""
    segments = []
    for label, *score, mask in masks:
        segments.append({"label": label, **({"score": score[0]} if score else {}), "mask": to_rle(mask)})
    return {"size": list(size), "segments": segments, **more}


# Semantic.

NAMES = dict(enumerate(CLASSES))
SEMANTIC = Reading(classes=NAMES)


def maps(count, seed):
    """(predicted, true) ids. The last class is nowhere, the last but one predicted only; predicted -1: nothing."""
    chance = np.random.default_rng(seed)
    for _ in range(count):
        shape = chance.integers(1, 23, 2)
        true = chance.integers(0, 3, shape)
        predicted = np.where(chance.random(shape) < 0.6, true, chance.integers(0, 4, shape))
        predicted[chance.random(shape) < 0.1] = -1
        true[chance.random(shape) < 0.2] = VOID
        yield predicted, true


def of_maps(pairs):
    for predicted, true in pairs:
        found = [(NAMES[i], predicted == i) for i in np.unique(predicted[predicted >= 0]).tolist()]
        row = {"mask": Image.fromarray(true.astype(np.uint8))}
        yield painted(true.shape[::-1], found), row


def test_semantic_equals_scikit_learn():
    pairs = list(maps(25, 3))
    result = scored(of_maps(pairs), SEMANTIC).result()
    true = np.concatenate([t.ravel() for _, t in pairs])
    predicted = np.concatenate([p.ravel() for p, _ in pairs])[true != VOID]
    true = true[true != VOID]
    assert (predicted == -1).any()
    ids = range(4)  # of the fifth nothing is seen
    ious = jaccard_score(true, predicted, labels=[*ids], average=None, zero_division=0)
    recalls = recall_score(true, predicted, labels=[*ids], average=None, zero_division=0)
    counts = confusion_matrix(true, predicted, labels=[*ids, -1])
    assert set(result["per_class"]) == set(CLASSES[:4])
    for i in ids:
        held = result["per_class"][NAMES[i]]
        assert held["IoU"] == pytest.approx(ious[i], rel=1e-12)
        assert held["pixels"] == counts[i].sum()
        assert held["accuracy"] == (pytest.approx(recalls[i], rel=1e-12) if counts[i].sum() else None)
    assert result["mIoU"] == pytest.approx(ious.mean(), rel=1e-12)
    assert ious[3] == 0  # predicted, and nowhere true
    assert result["pixel_accuracy"] == pytest.approx(counts.diagonal().sum() / counts.sum(), rel=1e-12)
    assert result["mean_accuracy"] == pytest.approx(recalls[:3].mean(), rel=1e-12)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_semantic_order_and_split_do_not_matter(order):
    pairs = list(of_maps(maps(25, 4)))
    assert merged(pairs, SEMANTIC, order).result() == scored(pairs, SEMANTIC).result()


def test_semantic_of_objects():
    """Later objects lie above earlier ones; the background is a class."""
    row = {
        "objects": {
            "masks": [[[0, 0, 4, 0, 4, 2, 0, 2]], [[2, 0, 4, 0, 4, 4, 2, 4]]],
            "labels": ["car", "boat"],
        }
    }
    left, right = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:2, :2], right[:, 2:4] = True, True
    found = painted((6, 4), [("car", left), ("boat", right), ("sea", ~left & ~right)])
    result = scored([(found, row)], Reading(background="sea")).result()
    assert result["mIoU"] == result["pixel_accuracy"] == 1
    assert {name: held["pixels"] for name, held in result["per_class"].items()} == {"car": 4, "boat": 8, "sea": 12}
    without = scored([(found, row)], Reading()).result()  # what no object covers is no truth
    assert without["pixel_accuracy"] == 1
    assert "sea" not in without["per_class"]


def test_semantic_of_nothing():
    blank = {"mask": Image.new("L", (3, 2), VOID)}
    result = scored([(painted((3, 2), [("sky", np.ones((2, 3), bool))]), blank)], SEMANTIC).result()
    assert result == {"mIoU": None, "pixel_accuracy": None, "mean_accuracy": None, "per_class": {}}
    sky = {"mask": Image.new("L", (3, 2), 0)}
    result = scored([(painted((3, 2), []), sky)], SEMANTIC).result()
    assert (result["mIoU"], result["pixel_accuracy"]) == (0, 0)


@pytest.mark.parametrize(
    ("prediction", "error", "said"),
    [
        (painted((3, 3), []), DataError, "3 x 3"),
        (painted((3, 2), [("sky", np.ones((3, 2), bool))]), ValueError, r"3 x 2 has a mask of \[2, 3\]"),
        (
            painted((3, 2), [("sky", np.ones((2, 3), bool)), ("road", np.ones((2, 3), bool))]),
            ValueError,
            "disjoint",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_faults(prediction, error, said, kind):
    row = {
        "semantic": {"mask": Image.new("L", (3, 2), 0)},
        "panoptic": {"mask": Image.new("L", (3, 2), 1), "objects": {"segments": [{"id": 1, "label": "sky"}]}},
    }[kind]
    with pytest.raises(error, match=said):
        meter_of(Reading(kind, classes=NAMES if kind == "semantic" else None)).update(prediction, row)


# Instances.

INSTANCE = Reading("instance")
KINDS = [f"class {i}" for i in range(6)]
METRICS = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "mAR1", "mAR10", "mAR100")
METRICS += ("mAR_small", "mAR_medium", "mAR_large")  # as pycocotools lists them


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
    result = scored(pairs, INSTANCE).result()
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
    whole = scored(pairs, INSTANCE).result()
    for order in ((0, 1, 2), (2, 0, 1)):
        assert merged(pairs, INSTANCE, order).result() == whole


def test_instances_keep_runs_and_no_pixels():
    """A mask of a million pixels is kept in a hundred bytes."""
    mask = np.zeros((1000, 1000), bool)
    mask[100:900, 100:900] = True
    row = {"objects": {"masks": [to_rle(mask)], "labels": ["class 0"]}}
    meter = scored([(painted((1000, 1000), [("class 0", 0.9, mask)]), row)] * 3, INSTANCE)
    assert len(pickle.dumps(meter)) < 20_000
    assert meter.result()["mAP"] == 1


def test_instances_of_a_panoptic_mask():
    ids = np.zeros((20, 30), np.uint8)
    ids[2:10, 2:10], ids[12:18, 5:25], ids[0:2] = 1, 2, 3
    segments = [{"id": 1, "label": "car"}, {"id": 2, "label": "car"}, {"id": 3, "label": "sky", "thing": False}]
    row = {"mask": Image.fromarray(ids), "objects": {"segments": segments}}
    found = painted((30, 20), [("car", 0.9, ids == 1), ("car", 0.8, ids == 2)])
    result = scored([(found, row)], INSTANCE).result()
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


# Panoptic.

PANOPTIC = Reading("panoptic")
THINGS = {"car": True, "boat": True, "cow": True, "sky": False, "road": False, "grass": False}


def cut(shape, chance, pieces):
    """int [h, w]: a picture cut into at most so many pieces, from 1, and 0 for what is in none."""
    ids = np.zeros(shape, int)
    for i in range(1, pieces + 1):
        ids[blob(shape, chance, chance.uniform(2, 14))] = i
    return ids


def scenes(count, seed):
    """(predicted pixel by pixel, its classes, true pixel by pixel, its classes, crowds). Stuff is one segment a
    class; predictions are true segments with changed pixels, split ones, others."""
    chance = np.random.default_rng(seed)
    names = [*THINGS][:-1]  # the last is predicted only
    for _ in range(count):
        shape = tuple(chance.integers(12, 30, 2))
        true, labels, crowd = cut(shape, chance, 8), {}, {}
        for i in range(1, 9):
            label = str(chance.choice(names))
            if not THINGS[label] and label in labels.values():
                label = "car"
            labels[i], crowd[i] = label, THINGS[label] and chance.random() < 0.2
        predicted, found = true.copy(), dict(labels)
        noise = cut(shape, chance, 5)
        predicted[noise > 0] = noise[noise > 0] * (noise[noise > 0] < 4) * 100  # new segments, and holes
        for i in (100, 200, 300):
            found[i] = str(chance.choice([*THINGS]))
        for i in range(1, 9):
            if chance.random() < 0.2:
                found[i] = str(chance.choice([*THINGS]))
        yield predicted, found, true, labels, crowd


def of_scenes(scenes):
    for predicted, found, true, labels, crowd in scenes:
        there = np.unique(true[true > 0]).tolist()
        segments = [{"id": i, "label": labels[i], "thing": THINGS[labels[i]], "crowd": crowd[i]} for i in there]
        mask = Image.fromarray(np.stack([true, true * 0, true * 0], -1).astype(np.uint8))  # COCO's R + 256 G + …
        masks = [(found[i], predicted == i) for i in np.unique(predicted[predicted > 0]).tolist()]
        yield painted(true.shape[::-1], masks), {"mask": mask, "objects": {"segments": segments}}


def by_definition(scenes):
    """PQ of each class from sets of pixels, in exact fractions: the paper's equation 1 and section 4.1."""
    tallies = {}
    for predicted, found, true, labels, crowd in scenes:
        actual = {i: set(np.flatnonzero(true.ravel() == i).tolist()) for i in np.unique(true[true > 0]).tolist()}
        claimed = {
            j: set(np.flatnonzero(predicted.ravel() == j).tolist()) for j in np.unique(predicted[predicted > 0])
        }
        void = set(np.flatnonzero(true.ravel() == 0).tolist())
        taken = set()
        for name in {*labels.values(), *found.values()}:
            tally = tallies.setdefault(name, {"ious": [], "missed": 0, "wrong": 0})
            plain = [i for i in actual if labels[i] == name and not crowd[i]]
            ours = [j for j in claimed if found[j] == name]
            matched = set()
            for i, j in itertools.product(plain, ours):
                iou = Fraction(len(actual[i] & claimed[j]), len(actual[i] | (claimed[j] - void)))
                if iou > Fraction(1, 2):
                    assert (i, j) not in taken
                    matched |= {("true", i), ("found", j)}
                    tally["ious"].append(iou)
            tally["missed"] += sum(("true", i) not in matched for i in plain)
            forgiven = void.union(*(actual[i] for i in actual if labels[i] == name and crowd[i]))
            tally["wrong"] += sum(
                ("found", j) not in matched and 2 * len(claimed[j] & forgiven) <= len(claimed[j]) for j in ours
            )
    results = {}
    for name, tally in tallies.items():
        hits, others = len(tally["ious"]), tally["missed"] + tally["wrong"]
        if hits + others:
            quality = sum(tally["ious"]) / hits if hits else Fraction(0)
            recognised = hits / (hits + Fraction(others, 2))
            results[name] = {"SQ": quality, "RQ": recognised, "PQ": quality * recognised}
    return results, tallies


def average(results, metric, wanted=(True, False)):
    held = [values[metric] for name, values in results.items() if THINGS[name] in wanted]
    return float(sum(held) / len(held))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_panoptic_quality_by_its_definition(seed):
    pictures = list(scenes(40, seed))
    # A class that is predicted only is stuff where the options name it, here as the data do.
    reading = Reading("panoptic", stuff=tuple(name for name, thing in THINGS.items() if not thing))
    result = scored(of_scenes(pictures), reading).result()
    expected, tallies = by_definition(pictures)
    assert min(len(tally["ious"]) for name, tally in tallies.items() if name != "grass") > 2
    assert min(tally["wrong"] for tally in tallies.values()) > 0
    assert set(result["per_class"]) == set(expected)
    for name, values in expected.items():
        held = result["per_class"][name]
        assert held["thing"] == THINGS[name]
        assert held["segments"] == len(tallies[name]["ious"]) + tallies[name]["missed"]
        for metric, value in values.items():
            assert held[metric] == pytest.approx(float(value), rel=1e-12), (name, metric)
    for metric in ("PQ", "SQ", "RQ"):
        assert result[metric] == pytest.approx(average(expected, metric), rel=1e-12)
    assert result["PQ_things"] == pytest.approx(average(expected, "PQ", [True]), rel=1e-12)
    assert result["PQ_stuff"] == pytest.approx(average(expected, "PQ", [False]), rel=1e-12)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_panoptic_order_and_split_do_not_matter(order):
    pairs = list(of_scenes(scenes(30, 4)))
    assert merged(pairs, PANOPTIC, order).result() == scored(pairs, PANOPTIC).result()


def panoptic(ids, segments, found, **reading):
    """The result for one picture: ids a pixel, true segments by id, predicted (label, bool)."""
    ids = np.array(ids)
    row = {
        "mask": Image.fromarray(ids.astype(np.uint8)),
        "objects": {"segments": [{"id": i, **segment} for i, segment in segments.items()]},
    }
    return scored([(painted(ids.shape[::-1], found), row)], Reading("panoptic", **reading)).result()


def test_void_pixels_are_no_part_of_the_union():
    """4 of 4 true pixels, and 3 void ones beside them: IoU 1, not 4/7."""
    found = np.array([[1, 1, 1, 1, 1, 1, 1, 0]], bool)
    result = panoptic([[1, 1, 1, 1, 0, 0, 0, 0]], {1: {"label": "car"}}, [("car", found)])
    assert (result["PQ"], result["SQ"], result["RQ"]) == (1, 1, 1)


def test_what_lies_in_void_or_in_a_crowd_of_its_class_is_no_error():
    ids = [[1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0]]
    segments = {1: {"label": "car"}, 2: {"label": "cow", "crowd": True}}

    def at(*places):
        mask = np.zeros((1, 12), bool)
        mask[0, list(places)] = True
        return mask

    car = ("car", at(0, 1, 2, 3))
    assert panoptic(ids, segments, [car, ("cow", at(4, 5)), ("cow", at(6, 7))])["PQ"] == 1
    assert panoptic(ids, segments, [car, ("car", at(8, 9, 10))])["PQ"] == 1
    assert panoptic(ids, segments, [car, ("boat", at(4, 5))])["per_class"]["boat"]["PQ"] == 0
    half = panoptic(ids, segments, [("cow", at(2, 3, 4, 5)), ("car", at(0, 1))])  # half is not more than half
    assert half["per_class"]["cow"] == {"PQ": 0, "SQ": 0, "RQ": 0, "segments": 0, "thing": True}
    only = panoptic(ids, segments, [car, ("cow", at(4, 5))])["per_class"]["cow"]
    assert (only["PQ"], only["segments"]) == (None, 0)


def test_an_iou_of_a_half_is_no_match():
    ids = [[1, 1, 1, 1, 2, 2]]
    segments = {1: {"label": "car"}, 2: {"label": "sky", "thing": False}}
    half = np.array([[1, 1, 0, 0, 0, 0]], bool)
    result = panoptic(ids, segments, [("car", half)])
    assert result["per_class"]["car"]["RQ"] == 0
    more = np.array([[1, 1, 1, 0, 0, 0]], bool)
    held = panoptic(ids, segments, [("car", more)])["per_class"]["car"]
    assert (held["PQ"], held["SQ"], held["RQ"]) == (0.75, 0.75, 1)


def test_things_and_stuff():
    ids = [[1, 1, 2, 2, 3, 3]]
    segments = {1: {"label": "car"}, 2: {"label": "car"}, 3: {"label": "sky", "thing": False}}
    found = [("car", np.array([[1, 1, 0, 0, 0, 0]], bool)), ("sky", np.array([[0, 0, 0, 0, 1, 1]], bool))]
    result = panoptic(ids, segments, found)
    assert (result["PQ_things"], result["PQ_stuff"]) == (pytest.approx(1 / 1.5), 1)
    assert result["PQ"] == pytest.approx((1 / 1.5 + 1) / 2)
    found.append(("sea", np.array([[0, 0, 1, 1, 0, 0]], bool)))
    assert panoptic(ids, segments, found)["per_class"]["sea"]["thing"]
    assert not panoptic(ids, segments, found, stuff=("sea", "sky"))["per_class"]["sea"]["thing"]
    things = panoptic([[1, 1]], {1: {"label": "car"}}, [])
    assert (things["PQ_things"], things["PQ_stuff"]) == (0, None)


def test_panoptic_of_nothing():
    result = PanopticMeter(PANOPTIC).result()
    assert result == {**dict.fromkeys(["PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"]), "per_class": {}}


def test_the_meter_of_a_kind():
    kinds = {"semantic": SemanticMeter, "instance": InstanceMeter, "panoptic": PanopticMeter}
    for kind, meter in kinds.items():
        assert type(meter_of(Reading(kind))) is meter


def test_nothing_is_printed_and_no_torch_needed(capfd):
    scored(pictures(3, 2), INSTANCE).result()
    assert capfd.readouterr() == ("", "")
    code = (
        "import sys, fasttune_detection.segment_meters\nprint(*{'torch', 'cv2', 'pycocotools'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
