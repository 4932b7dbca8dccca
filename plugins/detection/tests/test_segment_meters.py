"""mIoU against scikit-learn, panoptic quality against its definition in exact fractions."""

import itertools
import json
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from fasttune.errors import DataError
from fasttune_detection.segment_meters import InstanceMeter, PanopticMeter, SemanticMeter, meter_of
from fasttune_detection.segments import Reading, to_rle

CLASSES = ["sky", "road", "tree", "car", "boat"]
VOID = 255


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


def painted(size, masks):
    """A prediction. masks: (label, bool [h, w])."""
    return {"size": list(size), "segments": [{"label": label, "mask": to_rle(mask)} for label, mask in masks]}


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


# Panoptic.

PANOPTIC = Reading("panoptic")
THINGS = {"car": True, "boat": True, "cow": True, "sky": False, "road": False, "grass": False}


def blob(shape, chance, side):
    """An ellipse somewhere, perhaps cut at the edge, never empty."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    y, x = chance.uniform(0, height), chance.uniform(0, width)
    high, wide = chance.uniform(0.3, 1, 2) * side
    mask = ((rows + 0.5 - y) / high) ** 2 + ((columns + 0.5 - x) / wide) ** 2 < 1
    mask[min(int(y), height - 1), min(int(x), width - 1)] = True
    return mask


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
