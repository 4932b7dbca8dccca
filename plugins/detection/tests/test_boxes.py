"""Every layout gives the same boxes, every fault its reason; conversions, resizing and clipping by hand."""

import json

import numpy as np
import pytest

from fasttune.errors import DataError
from fasttune_detection.boxes import Objects, clipped, convert, read_annotations, read_objects, resized

SIZE = (200, 100)
XYXY = [[10, 20, 60, 80], [0.5, 0, 199.5, 100]]
XYWH = [[10, 20, 50, 60], [0.5, 0, 199, 100]]
CXCYWH = [[0.175, 0.5, 0.25, 0.6], [0.5, 0.5, 0.995, 1.0]]
CORNERS = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)) for box in XYXY]

LAYOUTS = {
    "boxes are xyxy": {"boxes": XYXY, "labels": ["cat", "dog"]},
    "bbox is xywh": {"bbox": XYWH, "category": ["cat", "dog"]},
    "the row's format": {"boxes": XYWH, "labels": ["cat", "dog"], "format": "xywh"},
    "fractions": {"boxes": CXCYWH, "labels": ["cat", "dog"], "format": "cxcywh"},
    "hub set": {"id": [7, 9], "area": [3000, 9], "bbox": XYWH, "categories": ["cat", "dog"], "iscrowd": [0, 0]},
    "numpy": {"boxes": np.array(XYXY), "labels": np.array(["cat", "dog"])},
    "list": [{"bbox": box, "label": name} for box, name in zip(XYWH, ["cat", "dog"], strict=True)],
    "pipeline": [{"score": 0.9, "label": n, "box": b} for b, n in zip(CORNERS, ["cat", "dog"], strict=True)],
    "voc": [{"name": n, "bndbox": b} for b, n in zip(CORNERS, ["cat", "dog"], strict=True)],
    "null beside": {"boxes": None, "bbox": XYWH, "labels": None, "category": [" cat", "dog "], "iscrowd": None},
    "json text": json.dumps({"boxes": XYXY, "labels": ["cat", "dog"]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_objects(layout):
    objects = read_objects(LAYOUTS[layout], None, SIZE)
    assert objects.boxes.dtype == np.float32
    np.testing.assert_allclose(objects.boxes, XYXY, atol=2e-5)  # fractions times 200 round in float32
    assert objects.labels == ("cat", "dog")
    assert objects.crowd.dtype == bool
    assert not objects.crowd.any()


def test_an_option_wins_over_the_row_and_the_key():
    for value in ({"boxes": XYWH, "labels": [1, 2]}, {"boxes": XYWH, "labels": [1, 2], "format": "xyxy"}):
        np.testing.assert_array_equal(read_objects(value, "xywh", SIZE).boxes, np.float32(XYXY))
    named = read_objects([{"box": CORNERS[0], "label": "cat"}], "xywh", SIZE)
    np.testing.assert_array_equal(named.boxes, np.float32(XYXY[:1]))  # corners by name are corners


@pytest.mark.parametrize(
    "nothing",
    [
        [],
        {},
        "[]",
        {"boxes": [], "labels": []},
        {"bbox": [], "id": [], "category": [], "area": []},
        {"bbox": None, "category": None},
        {"boxes": np.zeros((0, 4)), "labels": np.array([])},
        {"boxes": [], "labels": [], "format": "cxcywh"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("size", [SIZE, None])
def test_an_image_without_objects_is_kept(nothing, size):
    objects = read_objects(nothing, None, size)
    assert objects.boxes.shape == (0, 4)
    assert objects.crowd.shape == (0,)
    assert len(objects) == 0


def test_ids_become_names_and_flags_follow():
    value = [{"bbox": XYWH[0], "category_id": 3, "iscrowd": 1}, {"bbox": XYWH[1], "category_id": np.int64(17)}]
    objects = read_objects(value, None, SIZE)
    assert objects.labels == ("3", "17")
    assert objects.crowd.tolist() == [True, False]


def one(*box, **more):
    return {"boxes": [[1, 2, 30, 40], list(box)], "labels": ["cat", "dog"], **more}


FAULTS = {
    "turned around": (one(60, 20, 10, 80), "box 2 of 2", "right edge at 10 before its left edge at 60"),
    "upside down": (one(10, 80, 60, 20), "bottom edge at 20 before its top edge at 80", "height above 0"),
    "no width": (one(10, 20, 10, 80), "box 2 of 2", "no area, 0 x 60 pixels"),
    "no height": (one(10, 20, 60, 20, format="xyxy"), "no area, 50 x 0", "expected width and height above 0"),
    "narrower than float32": (one(100.0, 20, 100.000001, 80), "no area"),
    "negative width": (one(10, 20, -5, 30, format="xywh"), "right edge at 5 before its left edge at 10"),
    "not a number": (one(10, 20, float("nan"), 80), "box 2 of 2", "nan", "finite numbers"),
    "infinite": (one(10, 20, float("inf"), 80), "inf", "finite"),
    "beyond floats": (one(10, 20, 10**400, 80), "box 2 of 2", "finite"),
    "far away": (one(10, 20, 1e30, 80), "box 2 of 2", "expected pixels"),
    "beyond the right": (
        one(10, 20, 250, 80),
        "50 pixels beyond the right edge of the 200 x 100 image; expected at most 1",
    ),
    "beyond the bottom": (one(10, 20, 60, 101.5), "1.5 pixels beyond the bottom edge"),
    "beyond the left": (one(-40, 20, 60, 80), "40 pixels beyond the left edge"),
    "beyond the top": (one(10, -2, 60, 80), "2 pixels beyond the top edge"),
    "wholly in the last pixel outside": (one(200.2, 20, 200.9, 80), "beyond the right edge"),
    "three numbers": (one(10, 20, 60), "box 2 of 2", "four numbers", "[10, 20, 60]"),
    "no numbers": (one(), "four numbers"),
    "null": ({"boxes": [None], "labels": ["cat"]}, "box 1 of 1", "four numbers", "None"),
    "text": (one(10, 20, "60", 80), "'60'", "not a number"),
    "true": (one(10, 20, True, 80), "True", "not a number"),
    "too few labels": ({"boxes": XYXY, "labels": ["cat"]}, "2 boxes and 1 labels"),
    "too many flags": (one(1, 2, 3, 4, crowd=[0, 0, 1]), "2 boxes and 3 crowd flags"),
    "too few areas": (one(1, 2, 3, 4, area=[]), "2 boxes and 0 areas"),
    "odd flag": (one(1, 2, 3, 4, crowd=[0, 2]), "box 2 of 2", "true or false", "2"),
    "negative area": (one(1, 2, 3, 4, area=[9, -4]), "box 2 of 2", "area in pixels", "-4"),
    "blank label": ({"boxes": XYXY, "labels": ["cat", " "]}, "box 2 of 2", "expected a class"),
    "null label": ({"boxes": XYXY, "labels": ["cat", None]}, "box 2 of 2", "expected a class", "found none"),
    "float label": ({"boxes": XYXY, "labels": [1, 2.0]}, "box 2 of 2", "float 2.0"),
    "no labels": ({"boxes": XYXY, "score": [1, 1]}, "expected the key 'labels'", "Keys: boxes, score"),
    "no boxes": ({"labels": ["cat"]}, "expected the key 'boxes'"),
    "misspelt boxes": ({"boxs": XYXY, "labels": ["cat", "dog"]}, "expected the key 'boxes'", "boxs"),
    "no label in the list": ([{"bbox": XYWH[0]}], "expected the key 'label'", "bbox"),
    "no box in the list": ([{"label": "cat"}], "expected the key 'bbox'"),
    "one box missing in the list": ([{"bbox": XYWH[0], "label": 1}, {"label": 2}], "box 2 of 2", "four numbers"),
    "bare boxes": (XYXY, "box 1 of 2", "a mapping with a box and a label"),
    "nothing": (None, "null", "without objects"),
    "a number": (7, "int 7"),
    "broken json": ('{"boxes": [[1, 2', "expected JSON"),
    "one box, not a list": ({"bbox": "10 20 30 40", "label": ["cat"]}, "bbox: expected a list"),
    "two kinds": ([{"box": CORNERS[0], "label": 1}, {"box": XYXY[1], "label": 2}], "boxes of one kind"),
    "unknown format": (one(1, 2, 3, 4, format="xywx"), "xyxy, xywh, cxcywh", "Did you mean"),
    "fractions as pixels": ({"boxes": CXCYWH, "labels": [1, 2]}, "fractions", "box_format to cxcywh"),
    "fractions as COCO": ({"bbox": [[0.1, 0.2, 0.3, 0.4]], "label": [1]}, "pixels", "box_format to cxcywh"),
    "pixels as fractions": ({"boxes": XYXY, "labels": [1, 2], "format": "cxcywh"}, "pixels", "xywh or xyxy"),
    "a fraction above 1": (
        {"boxes": [[0.9, 0.5, 0.4, 0.2]], "labels": [1], "format": "cxcywh"},
        "20 pixels beyond the right edge",
    ),
    "xywh read as xyxy": (
        {"boxes": [[100, 50, 20, 30], [1, 2, 3, 4]], "labels": [1, 2]},
        "All boxes of this image are good as xywh",
        "options.box_format to xywh",
    ),
    "xyxy read as xywh": ({"bbox": [[100, 50, 190, 90]], "label": [1]}, "options.box_format to xyxy"),
    "drawn before the rotation": (
        {"boxes": [[10, 20, 90, 180]], "labels": [1]},
        "fit an image of 100 x 200",
        "EXIF",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault):
    value, *said = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        read_objects(value, None, SIZE)
    assert caught.value.column == "objects"
    for words in said:
        assert words in caught.value.why


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ((100, 200), ("expected an image of 100 x 200, as the data state, found one of 200 x 100", "EXIF")),
        ((400, 200), ("expected an image of 400 x 200", "was it resized")),
        ((133, 67), ("was it resized",)),  # two thirds, rounded
        ((201, 100), ("was it resized",)),
        ((640, 480), ("is this the file that was annotated?",)),
    ],
)
@pytest.mark.parametrize("boxes", [XYXY[:1], []])
def test_an_image_of_another_size_than_the_row_states(stated, said, boxes):
    """Whose boxes lie in the frame all the same."""
    value = {"boxes": boxes, "labels": ["cat"] * len(boxes), "size": list(stated)}
    with pytest.raises(DataError) as caught:
        read_objects(value, None, SIZE)
    assert caught.value.column == "objects"
    assert all(words in caught.value.why for words in said)
    value["size"] = [200, 100]
    assert len(read_objects(value, None, SIZE)) == len(boxes)


@pytest.mark.parametrize("column", [[7.5, 9.5], ["small", "large"], [0, 1], [7], None])
def test_what_else_a_set_may_call_size_is_none_of_the_images(column):
    value = {"boxes": XYXY, "labels": ["cat", "dog"], "size": column}
    assert len(read_objects(value, None, SIZE)) == 2


def test_fractions_need_a_size():
    with pytest.raises(DataError, match="image's size"):
        read_objects({"boxes": CXCYWH, "labels": [1, 2]}, "cxcywh", None)


def test_without_a_size_the_frame_is_not_checked():
    objects = read_objects({"boxes": [[-5, 10, 9000, 20]], "labels": [1]}, None, None)
    assert objects.boxes.tolist() == [[-5, 10, 9000, 20]]
    with pytest.raises(DataError, match="right edge"):
        read_objects({"boxes": [[9, 10, 5, 20]], "labels": [1]}, None, None)


def test_what_lies_outside_by_a_pixel_is_clipped():
    value = {"boxes": [[-1, -0.4, 201, 101]], "labels": [1]}
    assert read_objects(value, None, SIZE).boxes.tolist() == [[0, 0, 200, 100]]
    assert read_annotations(value, None, SIZE).corners.tolist() == [[-1, -0.4, 201, 101]]


def test_annotations_keep_what_the_row_states():
    """To the last bit: 0.3 + 32 - 0.3 is not 32, and COCO's size buckets end at 32 x 32."""
    value = {"bbox": [[0.3, 0.3, 32, 32], [0, 0, 10, 10]], "label": [1, 2], "area": [None, 61.5]}
    stated = read_annotations(value, None, SIZE)
    assert stated.spans.tolist() == value["bbox"]
    assert stated.area.tolist() == [1024, 61.5]
    assert (stated.corners[0, 2] - stated.corners[0, 0]) != 32  # else this test shows nothing


@pytest.mark.parametrize("have", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("want", ["xyxy", "xywh", "cxcywh"])
def test_convert(have, want):
    table = {"xyxy": XYXY, "xywh": XYWH, "cxcywh": CXCYWH}
    found = convert(np.array(table[have], dtype=np.float64), have, want, SIZE)
    np.testing.assert_allclose(found, table[want], rtol=1e-12)


def test_convert_needs_a_size_for_fractions():
    with pytest.raises(ValueError, match="size"):
        convert(np.zeros((1, 4)), "xyxy", "cxcywh")


def some(*boxes):
    return Objects(np.float32(boxes).reshape(-1, 4), tuple("abc"[: len(boxes)]), np.zeros(len(boxes), dtype=bool))


def test_resized():
    assert resized(some((10, 20, 60, 80)), (200, 100), (100, 150)).boxes.tolist() == [[5, 30, 30, 120]]
    assert len(resized(some(), (200, 100), (100, 150))) == 0


def test_clipped_drops_what_nothing_is_left_of():
    objects = clipped(some((-10, -10, 20, 20), (200, 10, 220, 20), (150, 90, 250, 110)), SIZE)
    assert objects.boxes.tolist() == [[0, 0, 20, 20], [150, 90, 200, 100]]
    assert objects.labels == ("a", "c")


def test_take_and_lengths():
    objects = some((1, 2, 3, 4), (5, 6, 7, 8))
    assert objects.take(np.array([1, 0])).labels == ("b", "a")
    assert objects.take(np.array([False, True])).boxes.tolist() == [[5, 6, 7, 8]]
    with pytest.raises(ValueError, match="1 labels"):
        Objects(np.zeros((2, 4), np.float32), ("a",), np.zeros(2, bool))
