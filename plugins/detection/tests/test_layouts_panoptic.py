"""COCO's panoptic JSON becomes rows: masks found beside the images, and every fault named by its annotation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fasttune.errors import DataError
from fasttune.layouts import Place
from fasttune_detection.layouts import open_layout, open_segments
from fasttune_detection.segments import Reading, read_segments

CATEGORIES = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 90, "name": "sky", "isthing": 0}]
IMAGES = [{"id": 5, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}]
IDS = np.array([[300, 300, 70000], [0, 300, 70000]])
SEGMENTS = [{"id": 300, "category_id": 1, "iscrowd": 0, "area": 3}, {"id": 70000, "category_id": 90, "bbox": []}]


def annotation(image=5, file="a.png", segments=SEGMENTS, **more):
    return {"image_id": image, "file_name": file, "segments_info": segments, **more}


@pytest.fixture
def panoptic(tmp_path):
    """panoptic(annotations, …) -> the opened place; the JSON is set/annotations/panoptic_val.json."""

    def opened(
        annotations, *, images="val", masks="annotations/panoptic_val", root=None, opener=open_segments, **lists
    ):
        document = {"images": IMAGES, "categories": CATEGORIES, "annotations": annotations, **lists}
        path = tmp_path / "set" / "annotations" / "panoptic_val.json"
        for folder in (path.parent, tmp_path / "set" / images, tmp_path / "set" / masks):
            folder.mkdir(parents=True, exist_ok=True)
        pixels = np.stack([IDS % 256, IDS // 256 % 256, IDS // 65536], -1).astype(np.uint8)
        for name in ("a", "b"):
            Image.new("RGB", (3, 2)).save(tmp_path / "set" / images / f"{name}.jpg")
            Image.fromarray(pixels).save(tmp_path / "set" / masks / f"{name}.png")
        path.write_text(json.dumps(document))
        return opener(Place(path, document=json.loads(path.read_text()), root=root))

    return opened


BOTH = [annotation(), annotation(9, "b.png", [{"id": 300, "category_id": 1, "iscrowd": 1}, SEGMENTS[1]])]


def why(value):
    assert isinstance(value, DataError), value
    return value.why


def test_rows(panoptic, tmp_path):
    opened = panoptic(BOTH[::-1])
    assert opened.root == tmp_path / "set"
    assert opened.rows[0] == {
        "image": "val/a.jpg",
        "mask": "annotations/panoptic_val/a.png",
        "objects": {
            "segments": [
                {"id": 300, "label": "cat", "thing": True, "crowd": 0},
                {"id": 70000, "label": "sky", "thing": False, "crowd": None},
            ]
        },
    }
    assert opened.rows[1]["objects"]["segments"][0]["crowd"] == 1
    assert opened.notes == (f"images: {tmp_path}/set/val", f"masks: {tmp_path}/set/annotations/panoptic_val")


@pytest.mark.parametrize("images", ["annotations", "images", "images/val2017", "val2017", "data", "."])
@pytest.mark.parametrize("masks", ["annotations/panoptic_val", "panoptic_val", "masks", "images"])
def test_folders_that_are_found(panoptic, tmp_path, images, masks):
    opened = panoptic(BOTH, images=images, masks=masks)
    for row in opened.rows:
        assert (opened.root / row["image"]).is_file()
        assert (opened.root / row["mask"]).is_file()
    assert (tmp_path / "set").samefile(opened.root) or (tmp_path / "set") in opened.root.parents


def test_the_folder_that_the_user_names(panoptic, tmp_path):
    opened = panoptic(BOTH, images="elsewhere/pictures", root=tmp_path / "set" / "elsewhere" / "pictures")
    assert opened.rows[0]["image"] == "elsewhere/pictures/a.jpg"


def test_masks_that_are_nowhere(panoptic):
    with pytest.raises(
        DataError, match=r"none of the masks' files \(the first: 'a.png'\) is in any of these folders"
    ):
        panoptic(BOTH, masks="hidden/away")


def test_classes_of_which_nothing_says_whether_they_are_things(panoptic):
    opened = panoptic(BOTH, categories=[{"id": 1, "name": "cat"}, {"id": 90, "name": "sky"}])
    assert [segment["thing"] for segment in opened.rows[0]["objects"]["segments"]] == [None, None]
    with pytest.raises(DataError, match=r"categories\[0\]: isthing: expected 0 or 1, found 'yes'"):
        panoptic(BOTH, categories=[{"id": 1, "name": "cat", "isthing": "yes"}])


@pytest.mark.parametrize(
    ("broken", "column", "fault"),
    [
        ({"file_name": None, "id": 3}, "mask", "annotation 3: expected a file_name"),
        ({"file_name": "../../val/a.jpg"}, "mask", "annotation number 1: the path .* leads out of"),
        ({"file_name": "/etc/passwd"}, "mask", "leads out of"),
        ({"file_name": "a\0.png"}, "mask", "leads out of"),
        ({"segments_info": 3}, "objects", "segments_info: expected a list"),
        ({"segments_info": [3]}, "objects", "annotation number 1, segment 1: expected an object"),
        (
            {"segments_info": [SEGMENTS[0], {"id": 1, "category_id": 4}]},
            "objects",
            "annotation number 1, segment 2: category_id 4 is not among the 2 classes: 1 \\(cat\\)",
        ),
        ({"segments_info": [{"id": 1, "category_id": [1]}]}, "objects", "segment 1: category_id \\[1\\]"),
    ],
)
def test_broken_annotations(panoptic, broken, column, fault):
    opened = panoptic([{**BOTH[0], **broken}, BOTH[1]])
    with pytest.raises(DataError, match=fault):
        raise opened.rows[0][column]
    assert isinstance(opened.rows[1]["objects"], dict)


def test_images_that_lead_out_of_their_folder(panoptic):
    opened = panoptic(BOTH)
    assert opened.rows[0]["image"] == "val/a.jpg"
    document = [{"id": 5, "file_name": "../annotations/panoptic_val/a.png"}, IMAGES[1]]
    path = opened.root / "annotations" / "panoptic_val.json"
    held = {"images": document, "categories": CATEGORIES, "annotations": BOTH}
    rows = open_segments(Place(path, document=held)).rows
    assert "leads out of" in why(rows[0]["image"])


def test_annotations_and_images_that_have_no_other_half(panoptic):
    opened = panoptic([BOTH[0], annotation(5, "b.png", id=8), annotation(77, "b.png", id=4), 3])
    assert why(opened.rows[0]["mask"]) == "annotation 8: its image has an annotation before it"
    assert why(opened.rows[1]["mask"]) == "no annotation is of this image"
    assert "annotation 4: image_id 77 is not the id of any" in why(opened.rows[2]["image"])
    assert "annotation number 4: expected an object" in why(opened.rows[3]["image"])


def test_boxes_are_refused_as_before(panoptic):
    with pytest.raises(DataError, match="annotation 1 holds segments_info: a panoptic file; expected boxes"):
        panoptic([{**BOTH[0], "id": 1}, BOTH[1]], opener=open_layout)


def test_an_annotation_without_segments_info_among_others(panoptic):
    opened = panoptic([BOTH[0], {"image_id": 9, "file_name": "b.png"}])
    assert "segments_info: expected a list, found None" in why(opened.rows[1]["objects"])


def test_from_the_file_to_segments(panoptic):
    opened = panoptic([BOTH[0], annotation(9, "b.png", SEGMENTS[:1])])

    def segments(row):
        with Image.open(opened.root / row["mask"]) as mask:
            return read_segments({**row, "mask": mask}, (3, 2), Reading("panoptic"))

    found = segments(opened.rows[0])
    assert found.labels == ("cat", "sky")
    assert (found.masks == [IDS == 300, IDS == 70000]).all()
    assert found.thing.tolist() == [True, False]
    assert (found.void == (IDS == 0)).all()
    with pytest.raises(DataError, match="2 pixels have ids of no segment, such as 70000"):
        segments(opened.rows[1])
