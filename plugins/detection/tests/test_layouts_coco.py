"""COCO's JSON becomes rows: images found, ids mapped, and every fault named by its annotation."""

from __future__ import annotations

import json

import pytest

from fasttune.errors import DataError
from fasttune.layouts import Place
from fasttune_detection.layouts import open_layout

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "owl"}]
IMAGES = [
    {"id": 5, "file_name": "a.jpg", "width": 100, "height": 80},
    {"id": 9, "file_name": "b.jpg"},
    {"id": 2, "file_name": "c.jpg", "width": 60, "height": 60},
]


def box(key, image=5, category=1, bbox=(10, 20, 30, 40.5), **more):
    return {"id": key, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


@pytest.fixture
def coco(tmp_path):
    """coco(annotations, images=, …) -> the opened place; images lie in tmp/set/images, the JSON beside them."""

    def opened(annotations, *, where="images", file="annotations/instances_train.json", root=None, **lists):
        document = {"images": IMAGES, "categories": CATEGORIES, "annotations": annotations, **lists}
        document = {key: value for key, value in document.items() if value is not None}
        path = tmp_path / "set" / file
        for folder in (path.parent, tmp_path / "set" / where):
            folder.mkdir(parents=True, exist_ok=True)
        for image in IMAGES:
            (tmp_path / "set" / where / image["file_name"]).write_bytes(b"pixels")
        path.write_text(json.dumps(document))
        return open_layout(Place(path, document=json.loads(path.read_text()), root=root))

    return opened


def test_rows_in_the_order_of_the_images(coco, tmp_path):
    annotations = [box(1, 2, 90), box(2, 5, 7, (0, 0, 100, 80)), box(3, 2, 1, (1.5, 2.5, 3, 4))]
    opened = coco(annotations)
    assert opened.root == tmp_path / "set" / "images"
    assert opened.rows == [
        {
            "image": "a.jpg",
            "objects": {"boxes": [[0, 0, 100, 80]], "labels": ["dog"], "format": "xywh", "size": [100, 80]},
        },
        {"image": "b.jpg", "objects": {"boxes": [], "labels": [], "format": "xywh"}},
        {
            "image": "c.jpg",
            "objects": {
                "boxes": [[10, 20, 30, 40.5], [1.5, 2.5, 3, 4]],
                "labels": ["owl", "cat"],
                "format": "xywh",
                "size": [60, 60],
            },
        },
    ]
    assert (opened.split, opened.splits) == (None, ())


def test_classes_that_nothing_has_are_said_of_train_alone(coco, tmp_path):
    opened = coco([box(1), box(2, category=1)])
    said = (
        "2 of the 3 classes that it names have no object: dog, owl; a model that is trained on it won't know them"
    )
    assert said in opened.notes
    assert not any("no object" in note for note in coco([box(1), box(2, 9, 7), box(3, 9, 90)]).notes)
    for split, is_said in (("train", True), ("fold 1", True), ("validation", False), ("test", False)):
        path = tmp_path / "set" / "annotations" / "instances_train.json"
        document = {"images": IMAGES, "categories": CATEGORIES, "annotations": [box(1)]}
        notes = open_layout(Place(path, split, document)).notes
        assert any("no object" in note for note in notes) == is_said
    many = [{"id": i, "name": f"class {i:02}"} for i in range(20)]
    (note,) = (note for note in coco([box(1, category=3)], categories=many).notes if "no object" in note)
    assert "19 of the 20" in note
    assert "class 00, class 01, class 02, class 04" in note
    assert ", …;" in note


def test_crowds_areas_and_masks_are_handed_on(coco):
    polygon = [[1, 2, 30, 4, 5, 60.5]]
    rle = {"size": [80, 100], "counts": "abc"}
    annotations = [
        box(1, iscrowd=0, area=0, segmentation=polygon),
        box(2, iscrowd=1, segmentation=rle),
        box(3, segmentation=[]),
        box(4, image=2, iscrowd=False),
    ]
    first, _, last = (row["objects"] for row in coco(annotations).rows)
    assert first["crowd"] == [False, True, False]
    assert first["area"] == [0, None, None]
    assert first["masks"] == [polygon, rle, None]
    assert not last.keys() & {"crowd", "area", "masks"}


@pytest.mark.parametrize("image", ["five", 5, 5.0])
def test_ids_of_any_kind(coco, image):
    images = [{"id": image, "file_name": "a.jpg"}]
    (row,) = coco([box("x-1", image, "k")], images=images, categories=[{"id": "k", "name": " cat "}]).rows
    assert row["objects"]["labels"] == ["cat"]


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (
            box(31, category=2),
            "annotation 31: category_id 2 is not among the 3 classes: 1 (cat), 7 (dog), 90 (owl)",
        ),
        (box(31, category=0), "annotation 31: category_id 0 is not"),
        (box(31, category="1"), "annotation 31: category_id '1' is not"),
        (box(31, category=[1]), "annotation 31: category_id [1] is not"),
        (box(31, category=None), "annotation 31: category_id None is not"),
        (box(31, bbox=(1, 2, 3)), "annotation 31: bbox: expected [left, top, width, height], four finite"),
        (box(31, bbox=(1, 2, 3, float("nan"))), "annotation 31: bbox: expected"),
        (box(31, bbox=(1, 2, 3, "4")), "annotation 31: bbox: expected"),
        (box(31, bbox=(1, 2, True, 4)), "annotation 31: bbox: expected"),
        (box(31, bbox=(1, 2, 0, 4)), "a width and a height above 0"),
        (box(31, bbox=(1, 2, 3, -4)), "a width and a height above 0"),
        (box(31, bbox=(-2, 2, 3, 4)), "bbox [-2, 2, 3, 4] leaves the image of 100 x 80"),
        (box(31, bbox=(10, 20, 92, 4)), "leaves the image of 100 x 80"),
        (box(31, bbox=(60, 50, 95, 75)), "is it [left, top, right, bottom]?"),
        (box(31, iscrowd="no"), "annotation 31: iscrowd: expected 0 or 1, found 'no'"),
        ({"image_id": 5, "category_id": 1}, "annotation number 2: bbox: expected"),
    ],
)
def test_a_bad_annotation_makes_its_image_bad(coco, annotation, why):
    opened = coco([box(30), annotation, box(32, image=2)])
    fault = opened.rows[0]["objects"]
    assert isinstance(fault, DataError)
    assert fault.column == "objects"
    assert why in fault.why
    assert opened.rows[0]["image"] == "a.jpg"
    assert len(opened.rows) == 3
    assert opened.rows[2]["objects"]["labels"] == ["cat"]


def test_rounding_may_leave_the_frame_by_a_pixel(coco):
    assert coco([box(1, bbox=(-0.5, -1, 101, 81))]).rows[0]["objects"]["boxes"] == [[-0.5, -1, 101, 81]]


def test_all_faults_of_an_image_in_one(coco):
    why = coco([box(key, category=3) for key in range(8)]).rows[0]["objects"].why
    assert why.count("category_id 3") == 5
    assert why.endswith("; and 3 more")


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (box(31, image=6), "annotation 31: image_id 6 is not the id of any of the 3 images"),
        (box(31, image="5"), "str '5' is another id than the int"),
        (box(31, image=None), "annotation 31: image_id None"),
        (box(31, image={}), "annotation 31: image_id {}"),
        ("text", "annotation number 2: expected an object, found str"),
    ],
)
def test_an_annotation_of_no_image_is_a_bad_row_of_its_own(coco, annotation, why):
    opened = coco([box(30), annotation])
    assert [row["image"] for row in opened.rows[:3]] == ["a.jpg", "b.jpg", "c.jpg"]
    (stray,) = opened.rows[3:]
    assert why in stray["objects"].why
    assert stray["objects"].column == "objects"


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ({"id": 5, "file_name": "b.jpg"}, "image 'b.jpg': id 5: given to an image before it"),
        ({"file_name": "b.jpg"}, "image 'b.jpg': id None: expected a number or text"),
        ({"id": 9}, "images[1]: expected a file_name, found None"),
        ({"id": 9, "file_name": 3}, "images[1]: expected a file_name, found 3"),
    ],
)
def test_a_bad_image_is_a_bad_row(coco, image, why):
    rows = coco([box(1)], images=[IMAGES[0], image]).rows
    assert why in rows[1]["image"].why
    assert rows[0]["objects"]["labels"] == ["cat"]


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"categories": None}, "expected a list 'categories'"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            r"categories\[1\]: id 1 is given twice",
        ),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: expected a name, found None"),
        ({"categories": [{"name": "a"}]}, r"categories\[0\]: expected an id"),
        ({"categories": ["cat"]}, r"categories\[0\]: expected an object, found str"),
        ({"images": ["a.jpg"]}, r"images\[0\]: expected an object, found str"),
        ({"annotations": {}}, "expected a list 'annotations'"),
        ({"annotations": [{"image_id": 5, "segments_info": []}]}, "panoptic"),
    ],
)
def test_a_file_that_is_broken_as_a_whole(coco, lists, why):
    with pytest.raises(DataError, match=why):
        coco(**{"annotations": [box(1)], **lists})


def test_without_annotations_rows_have_no_objects(coco):
    opened = coco(None, categories=None)
    assert opened is None
    opened = coco(None)
    assert opened.rows == [{"image": "a.jpg"}, {"image": "b.jpg"}, {"image": "c.jpg"}]
    assert "the file has no annotations" in opened.notes


def test_categories_of_one_name_are_one_class_and_said(coco):
    categories = [*CATEGORIES, {"id": 91, "name": "dog"}]
    opened = coco([box(1, category=7), box(2, category=91)], categories=categories)
    assert opened.rows[0]["objects"]["labels"] == ["dog", "dog"]
    assert "class ids 7, 91 are all named 'dog' and become one class" in opened.notes


@pytest.mark.parametrize("document", [{"data": []}, {"images": "x", "annotations": []}, {"images": []}])
def test_other_documents_are_not_coco(tmp_path, document):
    assert open_layout(Place(tmp_path / "x.json", document=document)) is None


@pytest.mark.parametrize(
    ("file", "where"),
    [
        ("annotations/instances_train.json", "images"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_train.json", "train2017"),
        ("annotations/instances_val2017.json", "images/val"),
        ("annotations/valid.json", "val"),
        ("train/_annotations.coco.json", "train"),
        ("annotations.json", "images"),
        ("labels.json", "data"),
        ("annotations.json", "."),
    ],
)
def test_the_images_are_found(coco, tmp_path, file, where):
    opened = coco([box(1)], file=file, where=where)
    assert opened.root.resolve() == (tmp_path / "set" / where).resolve()
    assert opened.notes[0] == f"images: {opened.root}"


def test_images_of_another_split_are_not_taken(coco, tmp_path):
    """Both splits have an a.jpg: the JSON's name decides, the year included."""
    for other in ("val2017", "train2014"):
        (tmp_path / "set" / "images" / other).mkdir(parents=True)
        for image in IMAGES:
            (tmp_path / "set" / "images" / other / image["file_name"]).write_bytes(b"other")
    opened = coco([box(1)], file="annotations/instances_train2017.json", where="images/train2017")
    assert opened.root == tmp_path / "set" / "images" / "train2017"


def test_a_folder_with_most_of_the_images_is_taken(coco, tmp_path):
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "annotations" / "a.jpg").write_bytes(b"stray")
    assert coco([box(1)]).root == tmp_path / "set" / "images"


def test_images_that_are_nowhere(coco, tmp_path):
    with pytest.raises(DataError) as refused:
        coco([box(1)], where="pictures")
    message = str(refused.value)
    assert "'a.jpg'" in message
    assert "data.root" in message
    for tried in ("set", "set/annotations"):
        assert f"\n  {tmp_path / tried}\n" in message
    assert coco([box(1)], where="pictures", root=tmp_path / "set" / "pictures").root.name == "pictures"
    with pytest.raises(DataError, match=r"data\.root"):
        coco([box(1)], where="pictures", root=tmp_path / "set" / "annotations")


def test_a_folder_of_coco_files_is_not_guessed_in(coco, tmp_path):
    coco([box(1)])
    with pytest.raises(DataError, match=r"name one: .*annotations/instances_train\.json"):
        open_layout(Place(tmp_path / "set"))
    assert open_layout(Place(tmp_path / "set" / "images")) is None
