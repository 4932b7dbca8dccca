"""Truth in every form becomes the same segments; pycocotools is the oracle of polygons and run lengths."""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as oracle

from fasttune.errors import DataError
from fasttune_detection.masks import mask_of
from fasttune_detection.segments import Reading, Segments, from_rle, read_segments, to_rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")

SIZE = (23, 17)  # width, height
SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]


def read(size=SIZE, mask=None, objects=None, **reading):
    row = {"mask": mask, "objects": objects}
    return read_segments({key: held for key, held in row.items() if held is not None}, size, Reading(**reading))


def picture(ids, mode=None):
    """A mask as the host hands it over."""
    image = Image.fromarray(np.asarray(ids))
    return image.convert(mode) if mode else image


def drawn(*boxes, size=SIZE):
    """bool [h, w]: rectangles (x1, y1, x2, y2), in whole pixels."""
    mask = np.zeros(size[::-1], dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def random_mask(rng, size=SIZE):
    return rng.random(size[::-1]) < rng.random()


# Run lengths and polygons


@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_are_cocos(seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(1, 120, 2))
    mask = [random_mask(rng, size), np.ones(size[::-1], bool), np.zeros(size[::-1], bool)][
        seed % 3 if seed < 9 else 0
    ]
    theirs = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = to_rle(mask)
    assert ours == {"size": [size[1], size[0]], "counts": theirs["counts"].decode()}
    json.dumps(ours)
    for counts in (ours["counts"], theirs["counts"], lengths_of(mask), np.array(lengths_of(mask))):
        found = from_rle({"size": list(mask.shape), "counts": counts})
        assert found.dtype == bool
        assert found.flags.c_contiguous
        assert (found == mask).all()


def lengths_of(mask):
    flat = [False, *mask.T.ravel().tolist()]
    changes = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    ends = [i - 1 for i in changes] + [len(flat) - 1]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_run_lengths_longer_than_sixteen_bits():
    mask = np.zeros((900, 1000), dtype=bool)
    mask[:, 700:] = True
    mask[3, 5] = True
    assert (from_rle(to_rle(mask)) == mask).all()


@pytest.mark.parametrize(
    ("rle", "why"),
    [
        ({"size": [4, 3], "counts": [5, 6]}, "add up to 11; expected 12"),
        ({"size": [4, 3], "counts": [5, 8]}, "add up to 13"),
        ({"size": [4, 3], "counts": [14, -2]}, "length -2"),
        ({"size": [4, 3], "counts": [2**62, 2**62, 2**62, 2**62, 12]}, "add up to"),
        ({"size": [4, 3], "counts": [10**30]}, "whole numbers"),
        ({"size": [4, 3], "counts": [5.0, 7.0]}, "whole numbers"),
        ({"size": [4, 3], "counts": [[5, 7]]}, "whole numbers"),
        ({"size": [4, 3], "counts": ["5", "7"]}, "whole numbers"),
        ({"size": [4, 3], "counts": []}, "add up to 0"),
        ({"size": [4, 3], "counts": None}, "text or a list"),
        ({"size": [4, 3]}, "text or a list"),
        ({"size": [4, 3], "counts": ""}, "are empty"),
        ({"size": [4, 3], "counts": "\x7f\x80"}, "none of compressed"),
        ({"size": [4, 3], "counts": "ä"}, "none of compressed"),
        ({"size": [4, 3], "counts": b"\xff"}, "none of compressed"),
        ({"size": [4, 3], "counts": "o" * 50}, "end within a number"),
        ({"size": [4, 3], "counts": "o" * 50 + "0"}, "of 51 characters"),
        ({"size": [4, 3], "counts": "oooooo0"}, "length -1|add up"),
        ({"size": [3, 4, 1], "counts": "<"}, "expected \\[height, width\\]"),
        ({"size": [0, 4], "counts": "0"}, "expected \\[height, width\\]"),
        ({"size": "4x3", "counts": "<"}, "expected \\[height, width\\]"),
        ({"counts": "<"}, "expected \\[height, width\\]"),
    ],
)
def test_run_lengths_that_are_none(rle, why):
    with pytest.raises(ValueError, match=why):
        from_rle(rle)


def test_garbage_in_the_place_of_run_lengths_never_ends_the_process():
    rng = np.random.default_rng(3)
    refused = kept = 0
    for _ in range(3000):
        text = "".join(rng.choice(list(string.printable), int(rng.integers(0, 12))))
        try:
            assert from_rle({"size": [17, 23], "counts": text}).shape == (17, 23)
        except ValueError:
            refused += 1
    assert refused > 2900
    whole = to_rle(random_mask(rng))
    for _ in range(2000):
        at = int(rng.integers(len(whole["counts"])))
        damaged = whole["counts"][:at] + chr(int(rng.integers(48, 112))) + whole["counts"][at + 1 :]
        try:
            found = from_rle({"size": whole["size"], "counts": damaged})
        except ValueError:  # what is refused is never given to the oracle: it writes beyond its memory
            refused += 1
            continue
        kept += 1
        assert (found == oracle.decode({"size": whole["size"], "counts": damaged.encode()})).all()
    assert kept > 10


@pytest.mark.parametrize("seed", range(40))
def test_polygons_are_cocos(seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(8, 150, 2))
    polygons = []
    for _ in range(int(rng.integers(1, 4))):
        points = rng.uniform(-0.9, np.array(size) + 0.9, (int(rng.integers(3, 20)), 2))
        polygons.append((np.round(points) if seed % 2 else points).clip(-0.9).ravel().tolist())
    theirs = oracle.decode(oracle.merge(oracle.frPyObjects(polygons, size[1], size[0]))).astype(bool)
    assert theirs.any()
    assert (mask_of(polygons, size) == theirs).all()
    fractions = [(np.array(polygon).reshape(-1, 2) / size).ravel().tolist() for polygon in polygons]
    assert (mask_of(fractions, size, fractions=True) != theirs).mean() < 0.01  # rounding at the edges


def test_a_single_polygon_may_stand_by_itself():
    assert (mask_of(SQUARE, SIZE) == mask_of([SQUARE], SIZE)).all()
    assert (mask_of(np.array([SQUARE], dtype=np.float32), SIZE) == drawn((2, 3, 8, 9))).all()


NOT_POLYGONS = {
    "two points": ([[1, 1, 5, 5]], "at least 3 points, found 2"),  # pycocotools would read it as a box
    "no points": ([[]], "at least 3 points, found 0"),
    "an odd count": ([[1, 1, 5, 1, 5]], "pairs of x and y, found 5"),
    "the second": ([SQUARE, [1, 1, 5, 5]], "polygon 2: expected at least 3"),
    "NaN": ([[1, 1, 5, float("nan"), 5, 5]], "finite numbers, found nan"),
    "infinity": ([[1, 1, 5, float("inf"), 5, 5]], "finite numbers, found inf"),
    "text": ([["1", "1", "5", "1", "5", "5"]], "expected numbers"),
    "null": ([[1, 1, 5, None, 5, 5]], "expected numbers"),
    "nested": ([[[1, 1], [5, 1], [5, 5]]], "expected numbers"),
    "unevenly nested": ([[[1, 1, 5], [5, 1]]], "expected numbers"),
    "pairs": ([[1, 1], [5, 1], [5, 5]], "found pairs"),
    "a number beside": ([SQUARE, 3], "polygon 2: expected numbers"),
    "a line": ([[1, 1, 5, 5, 9, 9]], "lie on one line"),
    "a point": ([[3, 3, 3, 3, 3, 3]], "lie on one line"),
    "left": ([[-1.5, 1, 5, 1, 5, 5]], "1.5 pixels beyond the left edge of the 23 x 17"),
    "right": ([[1, 1, 24.25, 1, 5, 5]], "1.25 pixels beyond the right"),
    "top": ([[1, -3, 5, 1, 5, 5]], "3 pixels beyond the top"),
    "bottom": ([[1, 1, 5, 1, 5, 19]], "2 pixels beyond the bottom"),
    "far": ([[1, 1, 1e300, 1, 5, 19]], "beyond the right"),
    "fractions": ([[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]], "as in fractions"),
    "no pixel": ([[2.1, 2.1, 2.2, 2.1, 2.2, 2.2]], "covers no pixel"),
    "nothing": ([], "expected a mask"),
    "none": (None, "expected a mask.* found none"),
    "a word": ("polygon", "expected a mask"),
    "run lengths of another size": (to_rle(np.ones((4, 4), bool)), "4 x 4 pixels; the image has 23 x 17"),
    "run lengths turned": (to_rle(np.ones((23, 17), bool)), "17 x 23 pixels; the image has 23 x 17"),
    "empty run lengths": (to_rle(np.zeros((17, 23), bool)), "covers no pixel"),
}


@pytest.mark.parametrize("name", NOT_POLYGONS)
def test_masks_that_are_none_name_their_object(name):
    stated, why = NOT_POLYGONS[name]
    with pytest.raises(DataError, match=why) as error:
        read(objects={"masks": [[SQUARE], stated], "labels": ["a", "b"]}, kind="instance")
    assert error.value.column == "objects"
    assert "object 2 of 2 (b): " in error.value.why


def test_an_eight_encloses_something():
    """Its signed area is none."""
    assert mask_of([[2, 2, 12, 12, 12, 2, 2, 12]], SIZE).any()


def test_pixels_in_the_place_of_fractions():
    with pytest.raises(ValueError, match="expected fractions from 0 to 1, found 9"):
        mask_of([SQUARE], SIZE, fractions=True)


# Objects


def objects_of(*held, **more):
    """(rectangle, label) each, as polygons."""
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for (x1, y1, x2, y2), _ in held]
    return {"masks": polygons, "labels": [label for _, label in held], **more}


A, B, C = ((1, 1, 9, 9), "a"), ((5, 5, 15, 12), "b"), ((2, 2, 4, 4), "a")


def test_instances_overlap_and_stay_in_order():
    found = read(objects=objects_of(A, B, C, crowd=[0, 1, 0], area=[7, None, float("nan")]), kind="instance")
    assert found.labels == ("a", "b", "a")
    assert [(mask == drawn(box)).all() for mask, (box, _) in zip(found.masks, (A, B, C), strict=True)] == [
        True
    ] * 3
    assert found.crowd.tolist() == [False, True, False]
    assert found.thing.all()
    assert not found.void.any()
    assert found.areas.tolist() == [7, 70, 4]
    assert found.take(np.array([2, 0])).areas.tolist() == [4, 7]
    assert found.size == SIZE


@pytest.mark.parametrize(
    "objects",
    [
        json.dumps(objects_of(A, B)),
        [{"segmentation": m, "category": n} for m, n in zip(*objects_of(A, B).values(), strict=True)],
        {"segmentation": objects_of(A, B)["masks"], "category": ["a", "b"], "bbox": [[0, 0, 1, 1]] * 2},
        {
            "masks": [to_rle(drawn(A[0])), {"size": [17, 23], "counts": lengths_of(drawn(B[0]))}],
            "labels": ["a", "b"],
        },
        {
            "masks": [[[x / s for x, s in zip(p[0], SIZE * 4, strict=True)]] for p in objects_of(A, B)["masks"]],
            "labels": ["a", "b"],
            "format": "cxcywh",
        },
    ],
)
def test_every_form_of_instances(objects):
    found = read(objects=objects, kind="instance")
    assert found.labels == ("a", "b")
    assert (found.masks == [drawn(A[0]), drawn(B[0])]).all()


def test_later_objects_cover_earlier_ones():
    semantic = read(objects=objects_of(A, B, C))
    assert semantic.labels == ("a", "b")
    b = drawn(B[0])
    assert (semantic.masks == [drawn(A[0]) & ~b, b]).all()
    assert (semantic.void == ~semantic.masks.any(0)).all()
    assert not semantic.thing.any()
    panoptic = read(objects=objects_of(A, B, C), kind="panoptic")
    assert panoptic.labels == ("a", "b", "a")
    assert (panoptic.masks.sum(0) <= 1).all()
    assert (panoptic.masks[2] == drawn(C[0])).all()
    hidden = read(objects=objects_of(C, A), kind="panoptic")
    assert (hidden.labels, hidden.areas.tolist()) == (("a",), [64])


def test_a_background_is_a_class_of_stuff_where_no_object_is():
    for kind in ("semantic", "panoptic"):
        found = read(objects=objects_of(A, B), kind=kind, background="ground")
        assert found.labels == ("a", "b", "ground")
        assert (found.masks[2] == ~(drawn(A[0], B[0]))).all()
        assert not found.void.any()
        assert not found.thing[2]
    assert read(objects={"masks": [], "labels": []}, background="ground").labels == ("ground",)
    assert read(objects={"masks": [], "labels": []}, kind="instance", background="ground").labels == ()
    joined = read(objects=objects_of(A, B), background="a")
    assert joined.labels == ("a", "b")
    assert joined.masks.any(0).all()


def test_stuff_is_joined_and_is_no_instance():
    far = ((16, 1, 20, 4), "a")
    found = read(objects=objects_of(A, B, far), kind="panoptic", stuff=("a",))
    assert (found.labels, found.thing.tolist()) == (("a", "b"), [False, True])
    assert (found.masks[0] == (drawn(A[0], far[0]) & ~drawn(B[0]))).all()
    assert read(objects=objects_of(A, B, far), kind="instance", stuff=("a",)).labels == ("b",)


@pytest.mark.parametrize(
    ("objects", "why"),
    [
        ({"labels": ["a"]}, "expected the key 'masks'"),
        ({"boxes": [[1, 1, 2, 2]], "labels": ["a"]}, "expected the key 'masks'"),
        ([{"bbox": [1, 1, 2, 2], "category_id": 1}], "expected the key 'segmentation'"),
        ({"masks": [[SQUARE]]}, "expected the key 'labels'"),
        ({"masks": [[SQUARE]], "labels": []}, "found 1 masks and 0 labels"),
        ({"masks": [[SQUARE]], "labels": ["a"], "crowd": [0, 0]}, "found 1 masks and 2 crowd flags"),
        ({"masks": [[SQUARE]], "labels": ["a"], "crowd": [2]}, "object 1 of 1: crowd"),
        ({"masks": [[SQUARE]], "labels": ["a"], "area": [-2]}, "object 1 of 1: expected an area"),
        ({"masks": [[SQUARE]], "labels": ["a"], "area": ["2"]}, "object 1 of 1: its area"),
        ({"masks": [[SQUARE]], "labels": [" "]}, "object 1 of 1: expected a class"),
        ({"masks": {"a": 1}, "labels": ["a"]}, "masks: expected a list"),
        ("{not JSON", "expected JSON"),
        (3, "expected masks and labels, found int"),
    ],
)
def test_objects_that_are_broken(objects, why):
    with pytest.raises(DataError, match=why) as error:
        read(objects=objects, kind="instance")
    assert error.value.column == "objects"


def test_neither_mask_nor_objects():
    with pytest.raises(DataError, match="found neither"):
        read()


# Masks of classes

IDS = np.array([[0, 1, 2, 255], [0, 1, 1, 255], [2, 2, 2, 0]], dtype=np.uint8)
ROW = {"classes": {"0": "sky", "1": "road", "2": "tree"}}


def semantic(mask, objects=None, **reading):
    return read(mask.size, mask, objects, **reading)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_segment_a_class(dtype):
    found = semantic(picture(IDS.astype(dtype)))
    assert found.labels == ("0", "1", "2")
    assert (found.masks == [IDS == 0, IDS == 1, IDS == 2]).all()
    assert (found.void == (IDS == 255)).all()
    assert not found.crowd.any()
    assert not found.thing.any()


def test_names_come_from_the_row_or_the_options():
    assert semantic(picture(IDS), ROW).labels == ("sky", "road", "tree")
    assert semantic(picture(IDS), json.dumps(ROW)).labels == ("sky", "road", "tree")
    assert semantic(picture(IDS), {"classes": ["sky", "road", "tree"]}).labels == ("sky", "road", "tree")
    assert semantic(picture(IDS), ROW, classes={0: "a", 1: "b", 2: "a"}).labels == ("a", "b")
    assert (semantic(picture(IDS), classes={0: "a", 1: "b", 2: "a"}).masks[0] == np.isin(IDS, (0, 2))).all()


def test_ids_above_255_and_below_0():
    ids = IDS.astype(np.int32) * 1000 - 1000
    found = semantic(picture(ids), ignore=(-1000,))
    assert found.labels == ("0", "1000", "254000")
    assert (found.void == (ids == -1000)).all()
    found = semantic(picture(IDS.astype(np.uint16) * 257), ignore=(65535,), classes={0: "a", 257: "b", 514: "c"})
    assert found.labels == ("a", "b", "c")


def test_an_id_outside_the_classes():
    with pytest.raises(DataError, match="4 pixels are 2, which is not among the 2 classes: 0 \\(sky\\)") as error:
        semantic(picture(IDS), {"classes": {"0": "sky", "1": "road"}})
    assert error.value.column == "mask"


def test_what_is_ignored_is_no_truth_and_needs_no_name():
    found = semantic(picture(IDS), ROW, ignore=(0, 255))
    assert found.labels == ("road", "tree")
    assert (found.void == np.isin(IDS, (0, 255))).all()
    found = semantic(picture(IDS), {"classes": {**ROW["classes"], "255": "edge"}}, ignore=())
    assert found.labels == ("sky", "road", "tree", "edge")
    found = semantic(picture(IDS), {"classes": {**ROW["classes"], "1": None}})
    assert found.labels == ("sky", "tree")
    assert (found.void == np.isin(IDS, (1, 255))).all()


def test_a_mask_without_truth_is_kept():
    """As an image without boxes is: nothing of it counts, and nothing in it is broken."""
    found = semantic(picture(np.full((3, 4), 255, np.uint8)), ROW)
    assert (len(found), found.masks.shape, found.void.all()) == (0, (0, 3, 4), True)


def test_a_palettes_indices_are_ids():
    mask = picture(IDS)
    mask.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    assert mask.mode == "P"
    assert semantic(mask, ROW).labels == ("sky", "road", "tree")


COLOURS = {"10,20,30": "sky", "255,0,0": "road", "0, 0, 255": "tree", "0,0,0": None}


def coloured():
    palette = np.array([[10, 20, 30], [255, 0, 0], [0, 0, 255]] + [[0, 0, 0]] * 253, dtype=np.uint8)
    return palette[IDS]


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_colours_are_classes_by_their_names(mode):
    """255 is an id that is ignored by default, and pure red."""
    mask = picture(coloured())
    mask = mask.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else mask
    found = semantic(mask, {"classes": COLOURS})
    assert set(found.labels) == {"sky", "road", "tree"}
    for label, number in (("sky", 0), ("road", 1), ("tree", 2)):
        assert (found.masks[found.labels.index(label)] == np.equal(IDS, number)).all()
    assert (found.void == (IDS == 255)).all()


def test_colours_by_their_number():
    classes = {10 + 20 * 256 + 30 * 65536: "sky", 255: "road", 255 * 65536: "tree", 0: "void"}
    assert set(semantic(picture(coloured()), classes=classes).labels) == {"sky", "road", "tree", "void"}


@pytest.mark.parametrize(
    ("objects", "why"),
    [
        (None, "in colours .* nothing says which class"),
        ({"classes": {"10,20,30": "sky"}}, "of the colour "),
        ({"classes": {"10,20": "sky", "1,2,3": "a"}}, "expected a colour"),
        ({"classes": {"10,20,256": "sky"}}, "expected a colour"),
    ],
)
def test_colours_that_nothing_names(objects, why):
    with pytest.raises(DataError, match=why):
        semantic(picture(coloured()), objects)


def test_ids_as_grey_colours():
    with pytest.raises(DataError, match=r"of the colour 1,1,1, .* the 2 classes: 0 \(sky\), 1 \(road\); are its"):
        semantic(picture(IDS % 2, "RGB"), {"classes": {"0": "sky", "1": "road", "2": None}})


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ({}, "expected names by id"),
        (3, "expected names by id"),
        ({"x": "sky"}, "expected an id"),
        ({"1.5": "sky"}, "expected an id"),
        ({"0": " "}, "expected a name"),
        ({"0": 3}, "expected a name"),
        ({"1,2,3": "sky"}, "named by colours, and the mask has none"),
    ],
)
def test_names_that_are_none(classes, why):
    with pytest.raises(DataError, match=why):
        semantic(picture(IDS), {"classes": classes})


@pytest.mark.parametrize("kind", ["instance", "panoptic"])
def test_a_mask_of_classes_tells_no_objects_apart(kind):
    with pytest.raises(DataError, match=f"as kind {kind} needs") as error:
        semantic(picture(IDS), ROW, kind=kind)
    assert error.value.column == "mask"


def test_a_mask_of_another_size():
    with pytest.raises(DataError, match="4 x 3 pixels; its image has 3 x 4"):
        read((3, 4), picture(IDS))


# Panoptic masks

SEGMENTS = [
    {"id": 300, "label": "car", "thing": True, "crowd": False},
    {"id": 70000, "label": "car", "thing": 1, "crowd": 1},
    {"id": 7, "label": "sky", "thing": False},
]
PANOPTIC = np.array([[300, 300, 7, 0], [70000, 300, 7, 7], [70000, 0, 7, 7]], dtype=np.int32)


def panoptic(ids=PANOPTIC, segments=SEGMENTS, kind="panoptic", rgb=True, **reading):
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8) if rgb else ids
    return read((4, 3), picture(pixels), {"segments": segments}, kind=kind, **reading)


@pytest.mark.parametrize("rgb", [True, False])
def test_panoptic_segments(rgb):
    found = panoptic(rgb=rgb)
    assert found.labels == ("car", "car", "sky")
    assert (found.masks == [PANOPTIC == 300, PANOPTIC == 70000, PANOPTIC == 7]).all()
    assert found.thing.tolist() == [True, True, False]
    assert found.crowd.tolist() == [False, True, False]
    assert (found.void == (PANOPTIC == 0)).all()


@pytest.mark.parametrize(
    "objects",
    [
        {
            "segments_info": [
                {"id": 300, "category_id": 3},
                {"id": 70000, "category_id": 3, "iscrowd": 1},
                *SEGMENTS[2:],
            ]
        },
        [{"id": 300, "category": 3}, {"id": 70000, "category": 3, "iscrowd": True}, *SEGMENTS[2:]],
        {"id": [300, 70000, 7], "category_id": [3, 3, "sky"], "iscrowd": [0, 1, 0], "isthing": [1, 1, 0]},
    ],
)
def test_segments_info_as_hub_sets_have_it(objects):
    found = read((4, 3), picture(PANOPTIC), objects, kind="panoptic")
    assert found.labels == ("3", "3", "sky")
    assert found.thing.tolist() == [True, True, False]
    assert found.crowd.tolist() == [False, True, False]


def test_other_kinds_from_a_panoptic_mask():
    classes = panoptic(kind="semantic")
    assert classes.labels == ("car", "sky")
    assert (classes.masks == [np.isin(PANOPTIC, (300, 70000)), PANOPTIC == 7]).all()
    assert not classes.thing.any()
    objects = panoptic(kind="instance")
    assert (objects.labels, objects.crowd.tolist()) == (("car", "car"), [False, True])
    assert (objects.void == (PANOPTIC == 0)).all()


def test_what_is_stuff_may_be_said_by_the_options():
    found = panoptic(stuff=("car",))
    assert (found.labels, found.thing.tolist()) == (("car", "sky"), [False, True])
    assert (found.masks[0] == np.isin(PANOPTIC, (300, 70000))).all()
    ignored = panoptic(segments=SEGMENTS[:2], ignore=(7,))
    assert (ignored.void == np.isin(PANOPTIC, (0, 7))).all()


@pytest.mark.parametrize(
    ("segments", "why", "column"),
    [
        (SEGMENTS[:2], "5 pixels have ids of no segment, such as 7", "mask"),
        ([*SEGMENTS, {"id": 8, "label": "tree"}], "segment 4 of 4 \\(tree\\): no pixel .* its id 8", "objects"),
        ([*SEGMENTS, SEGMENTS[0]], "segment 4 of 4: its id 300 is that of a segment before it", "objects"),
        ([{"label": "car"}, *SEGMENTS], "segment 1 of 4: expected an id", "objects"),
        ([{**SEGMENTS[0], "label": None}], "segment 1 of 1: expected a class", "objects"),
        ([{**SEGMENTS[0], "thing": "yes"}], "segment 1 of 1: thing: expected", "objects"),
        ([{**SEGMENTS[0], "crowd": "yes"}], "segment 1 of 1: crowd: expected", "objects"),
        (["car"], "segment 1 of 1: expected a mapping", "objects"),
        ({"id": 3}, "segments: expected a list", "objects"),
        ({"id": [3, 4], "label": ["a"]}, "lists of one length", "objects"),
    ],
)
def test_broken_segments(segments, why, column):
    with pytest.raises(DataError, match=why) as error:
        panoptic(segments=segments)
    assert error.value.column == column


def test_segments_without_a_mask():
    with pytest.raises(DataError, match="expected a panoptic mask"):
        read(objects={"segments": SEGMENTS})


def test_an_image_without_any_segment_is_void():
    found = panoptic(np.zeros((3, 4), np.int32), [])
    assert (len(found), found.void.all()) == (0, True)


def test_segments_that_were_read_already_are_handed_back():
    found = panoptic()
    assert read_segments({"objects": found}, (4, 3), Reading()) is found


def test_segments_must_fit_together():
    none = np.zeros(1, dtype=bool)
    with pytest.raises(ValueError, match="labels"):
        Segments(np.zeros((1, 3, 4), bool), ("a", "b"), none, none, np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="void"):
        Segments(np.zeros((1, 3, 4), bool), ("a",), none, none, np.zeros((4, 3), bool))
