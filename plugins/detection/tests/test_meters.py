"""COCO's metrics of boxes against pycocotools, whatever the order and the split."""

import contextlib
import io
import json
import logging
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasttune.errors import DataError
from fasttune_detection.meters import DetectionMeter

NAMES = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "mAR1", "mAR10", "mAR100")
NAMES += ("mAR_small", "mAR_medium", "mAR_large")  # as pycocotools lists them
CLASSES = [f"class {i}" for i in range(11)]
TOLERANCE = 1e-6  # as the issue asks; means of the same numbers are taken in another order


def pictures(count, seed, *, levels=None, crowds=0.1, classes=CLASSES):
    """(prediction, row) of random images, as a half-trained detector leaves them: shifted boxes, wrong classes,
    double and missing ones, more than a hundred of a class. levels: how many scores there are, so that many are
    equal; None: any."""
    random = np.random.default_rng(seed)
    for number in range(count):
        truths = int(random.integers(0, 15)) if random.random() > 0.15 else 0
        corner = random.uniform(0, 400, (truths, 2))
        spans = np.hstack([corner, np.exp(random.uniform(1, 5.5, (truths, 2)))]).round(2)
        labels = random.choice(classes[:-1], truths)  # the last one is predicted only
        crowd = random.random(truths) < crowds
        boxes, found = [], []
        for span, label in zip(spans.tolist() * 2, labels.tolist() * 2, strict=True):
            if random.random() < 0.7:
                x, y, width, height = (np.array(span) + random.normal(0, 0.08, 4) * ([*span[2:]] * 2)).tolist()
                boxes.append([x, y, x + abs(width), y + abs(height)])
                found.append(label if random.random() < 0.8 else str(random.choice(classes)))
        noise = 130 if number % 40 == 7 else int(random.integers(0, 6))
        for x, y, width, height in random.uniform(1, 300, (noise, 4)).tolist():
            boxes.append([x, y, x + width, y + height])
            found.append(classes[0] if noise == 130 else str(random.choice(classes)))
        scores = random.random(len(boxes))
        scores = scores if levels is None else (scores * levels).astype(int) / levels
        yield (
            {"boxes": boxes, "labels": found, "scores": scores.tolist()},
            {
                "image": f"images/page {number}.png",
                "objects": {"bbox": spans.tolist(), "label": labels.tolist(), "iscrowd": crowd.tolist()},
            },
        )


def official(pairs, iou_type="bbox"):
    """pycocotools' twelve numbers, and AP, AP50 and AP75 by class; images numbered in the order given."""
    ids = {name: i for i, name in enumerate(sorted({*CLASSES, *(n for p, _ in pairs for n in p["labels"])}))}
    truths, found = [], []
    for number, (prediction, row) in enumerate(pairs, start=1):
        objects = row["objects"]
        areas = objects.get("area") or [width * height for _, _, width, height in objects["bbox"]]
        for box, label, crowd, area in zip(
            objects["bbox"], objects["label"], objects["iscrowd"], areas, strict=True
        ):
            one = {"id": len(truths) + 1, "image_id": number, "category_id": ids[label], "bbox": box}
            truths.append({**one, "area": area, "iscrowd": int(crowd)})
        for (x1, y1, x2, y2), label, score in zip(
            *(prediction[k] for k in ("boxes", "labels", "scores")), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            found.append({"image_id": number, "category_id": ids[label], "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(pairs))],
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
            "annotations": truths,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    whole = {name: None if value == -1 else value for name, value in zip(NAMES, evaluation.stats, strict=True)}
    classes = {}
    for name, i in ids.items():
        table = evaluation.eval["precision"][:, :, evaluation.params.catIds.index(i), 0, -1]
        if table.max() > -1:
            classes[name] = {"AP": table.mean(), "AP50": table[0].mean(), "AP75": table[5].mean()}
    return whole, classes


def scored(pairs, **settings):
    meter = DetectionMeter(**settings)
    for prediction, row in pairs:
        meter.update(prediction, row)
    return meter


def assert_official(result, pairs):
    whole, classes = official(pairs)
    assert set(result) == {*NAMES, "per_class"}
    for name in NAMES:
        assert result[name] == (None if whole[name] is None else pytest.approx(whole[name], abs=TOLERANCE)), name
    assert set(result["per_class"]) == set(classes)
    for name, values in classes.items():
        for metric, value in values.items():
            assert result["per_class"][name][metric] == pytest.approx(value, abs=TOLERANCE), (name, metric)


@pytest.mark.parametrize("levels", [None, 10, 1], ids=["any score", "ten scores", "all equal"])
@pytest.mark.parametrize("crowds", [0.0, 0.25])
def test_equal_to_pycocotools(levels, crowds):
    pairs = list(pictures(300, 5, levels=levels, crowds=crowds))
    assert sum(len(row["objects"]["bbox"]) for _, row in pairs) > 1500
    assert sum(not row["objects"]["bbox"] for _, row in pairs) > 20
    result = scored(pairs).result()
    assert 0.05 < result["mAP"] < 0.95
    assert None not in [result[name] for name in NAMES]
    assert_official(result, pairs)


def test_the_order_of_ties_matters_here():
    """Else the test above would show nothing of them."""
    pairs = list(pictures(300, 5, levels=10))
    forth, back = official(pairs)[0]["mAP"], official(pairs[::-1])[0]["mAP"]
    assert abs(forth - back) > 10 * TOLERANCE


@pytest.mark.parametrize("levels", [None, 10, 1])
@pytest.mark.parametrize("paths", [True, False])
def test_neither_order_nor_split_matter(levels, paths):
    pairs = list(pictures(120, 6, levels=levels))
    if not paths:
        pairs = [(prediction, {"objects": row["objects"]}) for prediction, row in pairs]
    whole = scored(pairs).result()
    random.Random(1).shuffle(pairs)
    ranks = [scored(pairs[i::3]) for i in range(3)]
    ranks = [pickle.loads(pickle.dumps(rank)) for rank in ranks]  # as they travel
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = DetectionMeter()
        for i in order:
            merged.merge(ranks[i])
        assert merged.result() == whole


def test_one_class_few_images_and_sizes_that_do_not_occur():
    pairs = [
        (
            {"boxes": [[0, 0, 10, 10], [50, 50, 61, 60]], "labels": ["a", "a"], "scores": [0.5, 0.5]},
            {"objects": {"bbox": [[50, 50, 10, 10]], "label": ["a"], "iscrowd": [0]}},
        )
    ]
    result = scored(pairs).result()
    assert_official(result, pairs)
    assert result["mAP_large"] is None
    assert result["mAR_medium"] is None
    assert result["per_class"]["a"]["AP_large"] is None
    assert result["mAP50"] == pytest.approx(0.5)  # the false one, equal in score, comes first
    assert result["mAR1"] == 0
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("found", [0, 3])
def test_without_any_truth_there_is_no_number(found):
    prediction = {"boxes": [[1, 2, 3, 4]] * found, "labels": ["a"] * found, "scores": [0.1] * found}
    result = scored([(prediction, {"objects": {"boxes": [], "labels": []}})]).result()
    assert result == {**dict.fromkeys(NAMES), "per_class": {}}
    assert DetectionMeter().result() == result


def test_without_any_detection_all_is_zero():
    pairs = [(dict(boxes=[], labels=[], scores=[]), row) for _, row in pictures(20, 3)]
    result = scored(pairs).result()
    assert {result[name] for name in NAMES} == {0.0}
    assert all(held["AP"] == 0 for held in result["per_class"].values())


def test_every_box_is_scored_and_images_without_boxes_too():
    """An incomplete last batch loses none: the meter sees rows, not batches. A picture without truths counts by
    what is found in it."""
    pairs = list(pictures(17, 9, crowds=0))
    result = scored(pairs).result()
    boxes = [len(row["objects"]["bbox"]) for _, row in pairs]
    assert sum(held["objects"] for held in result["per_class"].values()) == sum(boxes)
    bare = [
        ({"boxes": [[1, 2, 30, 40]] * 4, "labels": CLASSES[:4], "scores": [1.0] * 4}, {"objects": []})
        for _ in range(9)
    ]
    assert scored(pairs + bare).result()["mAP"] < result["mAP"]
    assert_official(scored(pairs).result(), pairs)


def test_perfect_detections():
    pairs = [
        (
            {
                "boxes": [[x, y, x + w, y + h] for x, y, w, h in row["objects"]["bbox"]],
                "labels": row["objects"]["label"],
                "scores": [1.0] * len(row["objects"]["label"]),
            },
            row,
        )
        for _, row in pictures(30, 8, crowds=0)
    ]
    result = scored(pairs).result()
    assert {result[name] for name in NAMES if not name.startswith("mAR1")} == {1.0}


def test_sizes_are_areas_that_the_row_states():
    """As in COCO, whose area is the mask's: a box of 40 x 40 whose object fills a third is small."""
    truth = {"bbox": [[10, 10, 40, 40]], "label": ["a"], "iscrowd": [0], "area": [500.0]}
    pairs = [({"boxes": [[10, 10, 50, 50]], "labels": ["a"], "scores": [0.9]}, {"objects": truth})]
    result = scored(pairs).result()
    assert (result["mAP_small"], result["mAP_medium"]) == (1.0, None)
    assert_official(result, pairs)
    del truth["area"]
    assert scored(pairs).result()["mAP_medium"] == pytest.approx(1)


def test_a_size_on_the_border_is_in_both_as_in_coco():
    truth = {"bbox": [[10.3, 10.7, 32, 32]], "label": ["a"], "iscrowd": [0]}
    pairs = [({"boxes": [[10, 10, 42, 43]], "labels": ["a"], "scores": [0.9]}, {"objects": truth})]
    result = scored(pairs).result()
    assert result["mAP_small"] is not None
    assert result["mAP_medium"] is not None
    assert_official(result, pairs)


def test_a_crowd_forgives_what_lies_in_it():
    crowd = {"boxes": [[0, 0, 100, 100], [200, 200, 240, 240]], "labels": ["a", "a"], "crowd": [True, False]}
    found = {
        "boxes": [[5, 5, 20, 20], [30, 30, 60, 60], [200, 200, 240, 240]],
        "labels": ["a"] * 3,
        "scores": [0.9, 0.8, 0.7],
    }
    assert scored([(found, {"objects": crowd})]).result()["mAP"] == 1
    crowd["crowd"] = [False, False]
    assert scored([(found, {"objects": crowd})]).result()["mAP"] < 0.5


def test_truths_in_fractions_need_the_size():
    truth = {"objects": {"boxes": [[0.5, 0.5, 0.2, 0.4]], "labels": [3], "format": "cxcywh"}}
    found = {"boxes": [[80, 30, 120, 70]], "labels": ["3"], "scores": [0.9]}
    with pytest.raises(DataError, match="size"):
        scored([(found, truth)])
    assert scored([({**found, "size": [200, 100]}, truth)]).result()["mAP"] == 1
    wrong = {"objects": {"boxes": [[80, 30, 40, 40]], "labels": [3]}}
    assert scored([(found, wrong)], box_format="xywh").result()["mAP"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": [0.5]}, "2 boxes, 2 labels and 1 scores"),
        ({"labels": ["a"]}, "1 labels"),
        ({"scores": [0.5, float("nan")]}, "finite"),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3, float("inf")]]}, "finite"),
    ],
)
def test_a_broken_prediction_is_refused(change, said):
    prediction = {"boxes": [[1, 2, 3, 4]] * 2, "labels": ["a", "b"], "scores": [0.5, 0.6], **change}
    with pytest.raises(ValueError, match=said):
        DetectionMeter().update(prediction, {"objects": []})


def test_images_are_ordered_by_numbers_in_their_paths():
    """Ten equal scores, right and wrong by turns: the order decides."""

    def rows(names):
        for i, name in enumerate(names):
            truth = {
                "bbox": [[10, 10, 30, 30]] if i % 2 else [],
                "label": ["a"] * (i % 2),
                "iscrowd": [0] * (i % 2),
            }
            found = {"boxes": [[10, 10, 40, 40]], "labels": ["a"], "scores": [0.5]}
            yield found, {"image": name, "objects": truth}

    pairs = list(rows([f"scan/{i}.png" for i in range(1, 22)]))
    assert_official(scored(pairs[::-1]).result(), pairs)
    stored = [(found, {**row, "image": {"path": row["image"], "bytes": b"..."}}) for found, row in pairs]
    assert scored(stored[::-1]).result() == scored(pairs).result()


def test_nothing_is_printed_or_logged(capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        scored(pictures(5, 2)).result()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_it_needs_numpy_alone():
    code = (
        "import sys\nfrom fasttune_detection.meters import DetectionMeter\nmeter = DetectionMeter()\n"
        "truth = {'boxes': [[1, 2, 3, 4]], 'labels': [1]}\n"
        "meter.update({'boxes': [], 'labels': [], 'scores': []}, {'objects': truth})\n"
        "meter.result()\n"
        "print(*sorted({'torch', 'matplotlib', 'plotly', 'cv2', 'pandas', 'pycocotools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
