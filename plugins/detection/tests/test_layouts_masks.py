"""Folders of images and masks become rows: splits, pairs and class names found, everything left over named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fasttune.errors import DataError
from fasttune.layouts import Place
from fasttune_detection.classnames import find_names
from fasttune_detection.layouts import open_layout, open_segments
from fasttune_detection.segments import Reading, read_segments


@pytest.fixture
def folder(tmp_path):
    """folder({"images/a.png": "", …}) -> the opened split; texts of images don't matter."""

    def opened(files, *, split="train", root=None, place="set"):
        for name, text in files.items() if isinstance(files, dict) else ((name, "") for name in files):
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return open_segments(Place(tmp_path / place, split, root=root))

    return opened


def pairs(opened):
    return [(row["image"], row["mask"]) for row in opened.rows]


def why(value):
    assert isinstance(value, DataError), value
    return value.why


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "masks"),
        ("Images", "Masks"),
        ("imgs", "labels"),
        ("image", "annotations"),
        ("JPEGImages", "SegmentationClass"),
        ("img", "segmentation"),
    ],
)
def test_folders_beside_each_other(folder, tmp_path, images, masks):
    opened = folder([f"{images}/b.jpg", f"{images}/a.png", f"{masks}/b.png", f"{masks}/a.png", f"{masks}/note.md"])
    assert pairs(opened) == [(f"{images}/a.png", f"{masks}/a.png"), (f"{images}/b.jpg", f"{masks}/b.png")]
    assert (opened.split, opened.splits, opened.root) == (None, (), tmp_path / "set")
    assert opened.notes[0].startswith("no file names the ids of masks")
    assert "objects" not in opened.rows[0]


SPLIT = {
    "inside": "images/{split}/{name}.jpg masks/{split}/{name}.png",
    "outside": "{split}/images/{name}.jpg {split}/masks/{name}.png",
    "beside": "{split}/{name}.jpg {split}_labels/{name}_L.png",
    "run together": "{split}/{name}.png {split}annot/{name}.png",
    "in one folder": "{split}/{name}.jpg {split}/{name}_mask.png",
}


@pytest.mark.parametrize("layout", SPLIT)
def test_splits_on_either_level(folder, layout):
    def files(split, name):
        return SPLIT[layout].format(split=split, name=name).split()

    everything = [*files("train", "a"), *files("val", "b"), *files("test", "c"), *files("train", "deep/d")]
    expected = {"train": ["a", "deep/d"], "validation": ["b"], "val": ["b"], "test": ["c"]}
    for split, names in expected.items():
        opened = folder(everything, split=split)
        real = {"validation": "val"}.get(split, split)
        assert pairs(opened) == [tuple(files(real, name)) for name in names]
        assert (opened.split, opened.splits) == (real, ("test", "train", "val"))
    with pytest.raises(DataError, match=r"no split 'extra'.* Name one: .*:test, .*:train, .*:val"):
        folder(everything, split="extra")


def test_ade20k(folder):
    files = {f"{kind}/{split}/{name}": "" for kind, split, name in (
        ("images", "training", "ADE_train_1.jpg"),
        ("annotations", "training", "ADE_train_1.png"),
        ("images", "validation", "ADE_val_1.jpg"),
        ("annotations", "validation", "ADE_val_1.png"),
    )}  # fmt: skip
    files["objectInfo150.txt"] = (
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n2\t0.1\t9\t9\t1\tbuilding, edifice\n"
    )
    opened = folder(files)
    assert pairs(opened) == [("images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png")]
    assert opened.rows[0]["objects"] == {"classes": {0: None, 1: "wall", 2: "building, edifice"}}
    assert folder(files, split="validation").split == "validation"


def test_a_split_may_have_images_alone(folder):
    """A test set, to predict."""
    files = ["images/train/a.jpg", "masks/train/a.png", "images/test/b.jpg"]
    opened = folder(files, split="test")
    assert opened.rows == [{"image": "images/test/b.jpg"}]
    assert opened.notes == ("images/test: no masks; its images are to be predicted",)
    other = ["one/train/images/a.jpg", "one/train/masks/a.png", "one/test/images/b.jpg", "one/val/c.jpg"]
    assert folder(other, split="test", place="set/one").rows == [{"image": "test/images/b.jpg"}]
    assert folder(other, split="val", place="set/one").rows == [{"image": "val/c.jpg"}]


def test_what_is_left_over_is_a_bad_row(folder):
    pictures = ["images/a.jpg", "images/b.jpg", "images/d.jpg", "images/d.png", "images/e.jpg"]
    masks = ["masks/a.png", "masks/c.png", "masks/d.png", "masks/e.png", "masks/e.bmp"]
    opened = folder([*pictures, *masks])
    rows = {str(row["image"])[:60]: row for row in opened.rows}
    assert rows["images/a.jpg"]["mask"] == "masks/a.png"
    assert why(rows["images/b.jpg"]["mask"]) == "no mask is named b in masks"
    assert why(rows["images/e.jpg"]["mask"]) == "2 masks are named e: masks/e.bmp, masks/e.png"
    strays = [why(row["image"]) for row in opened.rows if isinstance(row["image"], DataError)]
    assert strays == [
        "masks/d.png: 2 images are named d: images/d.jpg, images/d.png",
        "masks/c.png: no image is named c in images",
    ]
    assert len(opened.rows) == 5


@pytest.mark.parametrize("end", ["_mask", "-mask", "_seg", "_gt", "_L", "_label"])
def test_masks_may_bear_a_mark(folder, end):
    """A name that fits as it stands comes first."""
    opened = folder(["images/a.jpg", f"masks/a{end}.png", f"images/b{end}.jpg", f"masks/b{end}.png"])
    assert pairs(opened) == [("images/a.jpg", f"masks/a{end}.png"), (f"images/b{end}.jpg", f"masks/b{end}.png")]


def test_masks_in_the_folder_of_their_images(folder):
    opened = folder(["a.jpg", "a_mask.png", "deep/b.jpg", "deep/b_mask.png", "c.jpg"])
    assert pairs(opened)[0] == ("a.jpg", "a_mask.png")
    assert why(opened.rows[1]["mask"]) == "no mask is named c in ."
    assert pairs(opened)[2] == ("deep/b.jpg", "deep/b_mask.png")


def test_no_two_files_that_belong_together(folder):
    with pytest.raises(
        DataError, match=r"no mask in masks bears the name of an image in images: .*x\.jpg.*y\.png"
    ):
        folder(["images/x.jpg", "masks/y.png"])


def test_masks_in_a_folder_of_another_depth(folder):
    """Oxford's pets. Names that lie in folders of their own are pairs only where those are alike."""
    opened = folder(["images/a.jpg", "images/b.jpg", "annotations/trimaps/a.png", "annotations/trimaps/b.png"])
    assert pairs(opened) == [(f"images/{name}.jpg", f"annotations/trimaps/{name}.png") for name in "ab"]
    both = ["x/images/1/a.jpg", "x/images/2/a.jpg", "x/masks/1/a.png", "x/masks/2/a.png"]
    assert pairs(folder(both, place="set/x")) == [(f"images/{i}/a.jpg", f"masks/{i}/a.png") for i in (1, 2)]


def test_cityscapes(folder):
    stem = "train/ulm/ulm_000001_000019_"
    files = [f"leftImg8bit/{stem}leftImg8bit.png", f"gtFine/{stem}gtFine_labelIds.png"]
    others = [f"gtFine/{stem}gtFine_{kind}.png" for kind in ("color", "instanceIds", "labelTrainIds")]
    opened = folder([*files, *others, f"gtFine/{stem}gtFine_polygons.json"])
    assert pairs(opened) == [tuple(files)]
    classes = opened.rows[0]["objects"]["classes"]
    assert len([name for name in classes.values() if name]) == 19
    assert (classes[7], classes[33], classes[0], classes[-1]) == ("road", "bicycle", None, None)
    assert opened.notes == ("class names: Cityscapes' 19 classes; its other ids are no truth",)
    assert (opened.split, opened.splits) == ("train", ("train",))


def test_pascal_voc(folder):
    lists = {"ImageSets/Segmentation/train.txt": "a\nc\n", "ImageSets/Segmentation/val.txt": "b\n"}
    files = [f"JPEGImages/{name}.jpg" for name in "abd"] + [f"SegmentationClass/{name}.png" for name in "abc"]
    opened = folder({**dict.fromkeys(files, ""), **lists, "Annotations/a.xml": "<annotation/>"})
    assert pairs(opened)[0] == ("JPEGImages/a.jpg", "SegmentationClass/a.png")
    assert why(opened.rows[1]["image"]) == "SegmentationClass/c.png: no image is named c in JPEGImages"
    assert (opened.split, opened.splits) == ("train", ("train", "val"))
    assert pairs(folder(lists, split="validation")) == [("JPEGImages/b.jpg", "SegmentationClass/b.png")]
    broken = folder({"ImageSets/Segmentation/test.txt": "d\nmissing\n"}, split="test")
    assert why(broken.rows[0]["mask"]) == "no mask is named d in SegmentationClass"
    assert why(broken.rows[1]["image"]) == "no image is named missing in JPEGImages"


NAMES = {
    "classes.txt": ("sky\nroad side\n", {0: "sky", 1: "road side"}),
    "labels.txt": ("1: sky\n3: road side\n", {1: "sky", 3: "road side"}),
    "id2label.json": ('{"0": "sky", "7": " road "}', {0: "sky", 7: "road"}),
    "classes.json": ('["sky", "road"]', {0: "sky", 1: "road"}),
    "labels.json": ('[{"id": 4, "name": "sky"}, {"id": 2, "name": null}]', {4: "sky", 2: None}),
    "class_dict.csv": ("name, r, g, b\nsky, 10, 20, 30\nVoid, 0,0,0\n", {"10,20,30": "sky", "0,0,0": None}),
    "_classes.csv": ("Pixel Value, Class\n0, background\n1, crack\n", {0: "background", 1: "crack"}),
    "labelmap.txt": (
        "# label:color_rgb:parts:actions\nsky:1,2,3::\nroad:255,0,0::",
        {"1,2,3": "sky", "255,0,0": "road"},
    ),
}


@pytest.mark.parametrize("file", NAMES)
def test_class_names(folder, file):
    text, names = NAMES[file]
    opened = folder({"images/a.jpg": "", "masks/a.png": "", file: text})
    assert opened.rows[0]["objects"] == {"classes": names}
    assert opened.notes[0] == f"class names: {file}"
    assert (len(opened.notes) == 2) == (file == "class_dict.csv")


def test_names_as_ids_of_names(tmp_path):
    (tmp_path / "classes.json").write_text('{"sky": 3, "road": 1}')
    assert find_names([tmp_path], tmp_path)[0] == {3: "sky", 1: "road"}


def test_names_beside_the_split_come_first(folder):
    files = ["train/a.jpg", "train/a_mask.png"]
    opened = folder(
        {**dict.fromkeys(files, ""), "train/_classes.csv": "Pixel Value,Class\n1,x", "classes.txt": "y"}
    )
    assert opened.rows[0]["objects"] == {"classes": {1: "x"}}


def test_rows_share_their_names(folder):
    opened = folder(
        {"images/a.jpg": "", "images/b.jpg": "", "masks/a.png": "", "masks/b.png": "", "classes.txt": "x"}
    )
    assert opened.rows[0]["objects"]["classes"] is opened.rows[1]["objects"]["classes"]


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("classes.txt", "sky\n\nroad", "line 2 is blank"),
        ("classes.txt", "", "line 1 is blank"),
        ("classes.txt", "0: sky\n0: road", "0 is named twice, sky and road"),
        ("id2label.json", "{0: 1", "broken JSON"),
        ("id2label.json", "3", "expected class names by id, found int"),
        ("id2label.json", '{"x": "sky", "1": "road"}', "expected an id"),
        ("id2label.json", '{"0": 1.5}', "expected a name"),
        ("classes.json", '[{"id": "x", "name": "sky"}]', "expected an id"),
        ("class_dict.csv", "a,b\n1,2", "expected the columns name, r, g, b, or name and id; found a, b"),
        ("class_dict.csv", "name,r,g,b\nsky,1,2", "line 2: expected 4 fields, found 3"),
        ("class_dict.csv", "name,r,g,b\nsky,1,2,300", "expected r,g,b"),
        ("class_dict.csv", "name,r,g,b\nsky,1,2,3\nroad,1,2,3", "1,2,3 is named twice"),
        ("labelmap.txt", "sky", "line 1: expected name:r,g,b"),
        ("classes.txt", "void\nunlabeled", "names no class"),
    ],
)
def test_broken_class_names(folder, file, text, fault):
    with pytest.raises(DataError, match=fault) as error:
        folder({"images/a.jpg": "", "masks/a.png": "", file: text})
    assert file in error.value.why


def test_class_names_outside_the_root_are_not_read(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("sky")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "classes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match="leads out of"):
        folder(["images/a.jpg", "masks/a.png"])


def test_folders_of_other_tasks(folder, tmp_path):
    assert folder(["cats/a.png", "dogs/b.png"]) is None
    assert open_layout(Place(tmp_path / "set")) is None
    with pytest.raises(DataError, match=r"has boxes .* and no masks"):
        folder({"JPEGImages/a.jpg": "", "Annotations/a.xml": "<annotation/>"})
    with pytest.raises(DataError, match=r"name one: .*instances_train\.json"):
        folder(["coco/annotations/instances_train.json", "coco/images/a.jpg"], place="set/coco")


def test_mask_folders_are_no_boxes(folder, tmp_path):
    assert folder(["images/a.jpg", "masks/a.png"])
    assert open_layout(Place(tmp_path / "set")) is None


# YOLO's polygons

DATA = "path: .\ntrain: images/train\nnames: [cat, dog]\n"


def test_yolos_polygons_are_masks(folder):
    lines = "1 0.1 0.2 0.9 0.2 0.9 0.8\n0 0 0 .5 0 .5 .5 0 .5\n"
    files = {"data.yaml": DATA, "images/train/a.png": "", "images/train/b.png": "", "labels/train/a.txt": lines}
    opened = folder(files)
    assert opened.rows == [
        {
            "image": "images/train/a.png",
            "objects": {
                "masks": [[[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]], [[0, 0, 0.5, 0, 0.5, 0.5, 0, 0.5]]],
                "labels": ["dog", "cat"],
                "format": "cxcywh",
            },
        },
        {"image": "images/train/b.png", "objects": {"masks": [], "labels": [], "format": "cxcywh"}},
    ]
    assert opened.notes == ("1 of 2 images have no file of labels: no masks",)
    found = read_segments(opened.rows[0], (40, 20), Reading("instance"))
    assert found.labels == ("dog", "cat")
    assert found.masks[1][:10, :20].all()
    assert found.areas[1] == 200


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1 0.5 0.5 1 1", "expected a polygon, .* found a box"),
        ("1 0.1 0.1 0.5 0.1 0.5", "found 6 values"),
        ("2 0.1 0.1 0.5 0.1 0.5 0.5", "class 2 is not among"),
        ("1 0.1 0.1 0.5 nan 0.5 0.5", "all numbers"),
        ("1 10 10 50 10 50 50", "expected fractions"),
    ],
)
def test_lines_that_are_no_polygons(folder, line, fault):
    lines = f"0 0 0 .5 0 .5 .5\n{line}\n"
    row = folder({"data.yaml": DATA, "images/train/a.png": "", "labels/train/a.txt": lines}).rows[0]
    assert "labels/train/a.txt, line 2: " in why(row["objects"])
    with pytest.raises(DataError, match=fault):
        raise row["objects"]


# COCO's instances

SQUARE = [2, 2, 8, 2, 8, 8, 2, 8]


@pytest.fixture
def coco(tmp_path):
    def opened(*annotations):
        document = {
            "images": [{"id": 5, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
            "categories": [{"id": 1, "name": "cat"}, {"id": 90, "name": "owl"}],
            "annotations": [{"image_id": 5, "category_id": 90, **held} for held in annotations],
        }
        for image in document["images"]:
            (tmp_path / image["file_name"]).touch()
        return open_segments(Place(tmp_path / "instances.json", document=json.loads(json.dumps(document))))

    return opened


def test_coco_needs_masks_and_no_boxes(coco):
    opened = coco(
        {"segmentation": [SQUARE], "area": 33},
        {"segmentation": {"size": [10, 12], "counts": [0, 10, 110]}, "iscrowd": 1, "category_id": 1},
    )
    found = read_segments(opened.rows[0], (12, 10), Reading("instance"))
    assert (found.labels, found.areas.tolist(), found.crowd.tolist()) == (("owl", "cat"), [33, 10], [False, True])
    assert opened.rows[1]["objects"] == {"masks": [], "labels": []}


@pytest.mark.parametrize(
    ("annotation", "fault"),
    [
        ({"id": 7}, "annotation 7: segmentation: expected polygons or run lengths, found none"),
        ({"segmentation": []}, "annotation number 1: segmentation: expected polygons"),
        ({"segmentation": [SQUARE], "category_id": 3}, "category_id 3 is not among"),
        ({"segmentation": [SQUARE], "iscrowd": 2}, "iscrowd: expected 0 or 1"),
    ],
)
def test_coco_faults(coco, annotation, fault):
    assert fault in why(coco(annotation).rows[0]["objects"])


def test_from_a_folder_to_segments(tmp_path):
    ids = np.array([[0, 1, 1], [0, 255, 2]], dtype=np.uint8)
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "train" / "a.jpg")
    Image.fromarray(ids).save(tmp_path / "masks" / "train" / "a.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ntree\n")
    opened = open_segments(Place(tmp_path))
    with Image.open(opened.root / opened.rows[0]["mask"]) as mask:
        found = read_segments({**opened.rows[0], "mask": mask}, (3, 2), Reading())
    assert found.labels == ("sky", "road", "tree")
    assert (found.masks == [ids == 0, ids == 1, ids == 2]).all()
    assert (found.void == (ids == 255)).all()
