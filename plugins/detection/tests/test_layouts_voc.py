"""Pascal VOC's folders become rows: corners between pixels, lists as splits, and no XML that expands."""

from __future__ import annotations

import numpy as np
import pytest

from fasttune.errors import DataError
from fasttune.layouts import Place
from fasttune_detection.layouts import open_layout

CORNERS = "corners are VOC's: pixels counted from 1, the last one included"
SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"


def thing(name="cat", corners=(11, 21, 40, 60), more=""):
    tags = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{tags}</bndbox></object>"


def xml(*things, file="any.jpg", size=SIZE):
    return f"<annotation><folder>x</folder><filename>{file}</filename>{size}{''.join(things)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """voc({"Annotations/a.xml": "…"}, images=["JPEGImages/a.jpg"]) -> the opened split."""

    def opened(files, images=("JPEGImages/a.jpg",), *, split="train", place="VOC", root=None):
        for name, text in {**dict.fromkeys(images, "pixels"), **files}.items():
            path = tmp_path / "VOC" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return open_layout(Place(tmp_path / place, split, root=root))

    return opened


def fault_of(opened):
    (row,) = opened.rows
    assert isinstance(row["objects"], DataError)
    assert row["objects"].column == "objects"
    return row["objects"].why


def test_a_row_an_image(voc, tmp_path):
    opened = voc(
        {
            "Annotations/a.xml": xml(thing(), thing("dog", (1, 1, 100, 80), "<difficult>1</difficult>")),
            "Annotations/b.xml": xml(size=""),
        },
        ["JPEGImages/a.jpg", "JPEGImages/b.PNG"],
    )
    assert opened.rows == [
        {
            "image": "JPEGImages/a.jpg",
            "objects": {
                "boxes": [[10, 20, 40, 60], [0, 0, 100, 80]],
                "labels": ["cat", "dog"],
                "format": "xyxy",
                "crowd": [False, True],
                "size": [100, 80],
            },
        },
        {"image": "JPEGImages/b.PNG", "objects": {"boxes": [], "labels": [], "format": "xyxy"}},
    ]
    assert (opened.root, opened.split, opened.splits) == (tmp_path / "VOC", None, ())
    assert opened.notes == (CORNERS, "1 of 2 objects are difficult: handled as crowd")


@pytest.mark.parametrize("corners", [(1, 1, 100, 80), (7, 3, 7, 3), (2, 5, 64, 9)])
def test_a_box_covers_the_pixels_that_voc_counts(voc, corners):
    """Drawn into an image as VOC says, pixels xmin to xmax of those counted from 1, and read back as a slice."""
    left, top, right, bottom = corners
    counted = np.zeros((80, 100), dtype=bool)
    for y in range(1, 81):
        for x in range(1, 101):
            counted[y - 1, x - 1] = left <= x <= right and top <= y <= bottom
    box = voc({"Annotations/a.xml": xml(thing(corners=corners))}).rows[0]["objects"]["boxes"][0]
    x0, y0, x1, y1 = map(int, box)
    drawn = np.zeros_like(counted)
    drawn[y0:y1, x0:x1] = True
    assert (drawn == counted).all()
    assert counted.sum() == (x1 - x0) * (y1 - y0)


def test_fractions_and_what_begins_at_zero(voc):
    opened = voc(
        {"Annotations/a.xml": xml(thing(corners=(0, 20, 40.5, 60)), thing(corners=(45.7, " 2 ", 50, 60)))}
    )
    assert opened.rows[0]["objects"]["boxes"] == [[-1, 19, 40.5, 60], [44.7, 1, 50, 60]]
    assert opened.notes[1].startswith("1 of 2 boxes begin at 0")


def test_parts_of_an_object_are_none_of_its_own(voc):
    part = (
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    )
    opened = voc({"Annotations/a.xml": xml(thing(more=part))})
    assert opened.rows[0]["objects"]["labels"] == ["cat"]
    assert opened.rows[0]["objects"]["boxes"] == [[10, 20, 40, 60]]


LISTS = {
    "ImageSets/Main/train.txt": "b\na\n",
    "ImageSets/Main/val.txt": "c\n\n",
    "ImageSets/Main/trainval.txt": "a\nb\nc\n",
    "ImageSets/Main/cat_train.txt": "b -1\na  1\n",
    "ImageSets/Main/cat_val.txt": "c  0\n",
    "ImageSets/Layout/test.txt": "a\n",
}
WHOLE = {f"Annotations/{name}.xml": xml(thing(name)) for name in "abc"} | LISTS
THREE = [f"JPEGImages/{name}.jpg" for name in "abc"]


@pytest.mark.parametrize(
    ("split", "names"), [("train", "ba"), ("validation", "c"), ("val", "c"), ("trainval", "abc")]
)
def test_lists_are_splits(voc, split, names):
    opened = voc(WHOLE, THREE, split=split)
    assert [row["image"] for row in opened.rows] == [f"JPEGImages/{name}.jpg" for name in names]
    assert [row["objects"]["labels"] for row in opened.rows] == [[name] for name in names]
    assert opened.splits == ("train", "trainval", "val")


def test_a_split_that_has_no_list(voc):
    with pytest.raises(DataError, match=r"no split 'test'.*VOC:train, .*VOC:trainval, .*VOC:val"):
        voc(WHOLE, THREE, split="test")


def test_an_image_of_a_list_without_xml_is_a_bad_row(voc):
    files = {name: text for name, text in WHOLE.items() if name != "Annotations/a.xml"}
    first, second = voc(files, THREE).rows
    assert first["objects"]["labels"] == ["b"]
    assert second["image"] == "JPEGImages/a.jpg"
    assert second["objects"].why == "no Annotations/a.xml"


def test_a_split_without_any_xml_has_no_objects(voc):
    """VOC's test sets: images to predict."""
    files = {"Annotations/c.xml": xml(thing()), "ImageSets/Main/test.txt": "a\nb\n"}
    opened = voc(files, THREE, split="test")
    assert opened.rows == [{"image": "JPEGImages/a.jpg"}, {"image": "JPEGImages/b.jpg"}]
    assert "no image of test has an XML file in Annotations" in opened.notes


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("Annotations", "JPEGImages"),
        ("annotations", "images"),
        ("annotations/xmls", "images"),
        (".", "."),
        ("Annotations", "."),
    ],
)
def test_folders_of_other_names(voc, annotations, images):
    opened = voc({f"{annotations}/a.xml": xml(thing())}, [f"{images}/a.jpg", f"{images}/z.jpg"])
    assert opened.rows[0]["image"] == f"{images}/a.jpg".removeprefix("./")
    assert opened.notes[-1] == "1 images without an XML file are left out, such as z"


@pytest.mark.parametrize(
    ("images", "file", "found"),
    [
        (["a.jpg"], "C:\\pictures\\IMG_1.jpg", "a.jpg"),
        (["IMG_1.jpg", "b.jpg"], "C:\\pictures\\IMG_1.jpg", "IMG_1.jpg"),
        (["a.jpg", "a.png"], "a.png", "a.png"),
        (["a.jpg", "a.png"], "b.png", "2 images are named a in JPEGImages, and filename is 'b.png'"),
        (["b.jpg"], "a.jpg", "no image is named a in JPEGImages, and filename is 'a.jpg'"),
        (["b.jpg"], "../../b.jpg", "b.jpg"),
    ],
)
def test_the_image_of_an_annotation(voc, images, file, found):
    opened = voc({"Annotations/a.xml": xml(thing(), file=file)}, [f"JPEGImages/{image}" for image in images])
    image = opened.rows[0]["image"]
    if isinstance(image, DataError):
        assert (image.column, image.why) == ("image", found)
    else:
        assert image == f"JPEGImages/{found}"


@pytest.mark.parametrize(
    ("things", "why"),
    [
        ([thing(), thing(corners=(50, 21, 40, 60))], "object 2 (cat): bndbox [50.0, 21.0, 40.0, 60.0]: a maximum"),
        ([thing(corners=(11, 61, 40, 60))], "object 1 (cat): bndbox"),
        ([thing(corners=(-1, 21, 40, 60))], "leaves the image of 100 x 80"),
        ([thing(corners=(11, 21, 102, 60))], "leaves the image of 100 x 80"),
        ([thing(corners=(11, 21, 40, 82))], "leaves the image of 100 x 80"),
        ([thing(corners=("x", 21, 40, 60))], "xmin: expected a number, found 'x'"),
        ([thing(corners=(11, "", 40, 60))], "ymin: expected a number, found ''"),
        ([thing(corners=(11, 21, "nan", 60))], "xmax: expected a number, found 'nan'"),
        ([thing(corners=(11, 21, 40, "6_0"))], "ymax: expected a number, found '6_0'"),
        ([thing(name=" ")], "object 1: has no name"),
        (["<object><name>cat</name></object>"], "object 1 (cat): has no bndbox"),
    ],
)
def test_a_bad_object_is_named(voc, things, why):
    fault = fault_of(voc({"Annotations/a.xml": xml(*things)}))
    assert fault.startswith("Annotations/a.xml: object")
    assert why in fault


def test_an_unknown_size_is_no_frame(voc):
    size = "<size><width>0</width><height>0</height></size>"
    objects = voc({"Annotations/a.xml": xml(thing(corners=(11, 21, 4000, 60)), size=size)}).rows[0]["objects"]
    assert objects["boxes"] == [[10, 20, 4000, 60]]
    assert "size" not in objects


ENTITIES = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 20))
BOMB = f"""<!DOCTYPE bomb [<!ENTITY e0 "aaaaaaaaaa">{ENTITIES}]><annotation>&e19;</annotation>"""
FILE = """<!DOCTYPE annotation [<!ENTITY secret SYSTEM "file://{}">]><annotation><object><name>&secret;</name>
</object></annotation>"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [BOMB, "<!DOCTYPE annotation><annotation/>", '<!DOCTYPE a SYSTEM "http://localhost/a.dtd"><annotation/>'],
    ids=["bomb", "bare", "external"],
)
def test_document_types_are_refused(voc, text, encoding):
    fault = fault_of(voc({"Annotations/a.xml": text.encode(encoding)}))
    assert fault.startswith("Annotations/a.xml: holds a document type (DTD)")


def test_entities_of_files_are_not_read(voc, tmp_path):
    (tmp_path / "secret").write_text("password")
    fault = fault_of(voc({"Annotations/a.xml": FILE.format(tmp_path / "secret")}))
    assert "document type" in fault
    assert "password" not in fault


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not well-formed XML: no element found"),
        ("<annotation><object></annotation>", "not well-formed XML: mismatched tag: line 1"),
        ("<annotation>&secret;</annotation>", "not well-formed XML: undefined entity"),
        ("<svg/>", "expected <annotation>, found <svg>"),
        (b"<annotation>\xff</annotation>", "not well-formed XML"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "not well-formed XML"),
    ],
)
def test_broken_xml_is_a_bad_row(voc, text, why):
    fault = fault_of(voc({"Annotations/a.xml": text}))
    assert fault.startswith("Annotations/a.xml: ")
    assert why in fault


def test_xml_is_not_read_outside_the_root(voc, tmp_path):
    (tmp_path / "outside.xml").write_text(xml(thing("secret")))
    voc({"Annotations/a.xml": xml()})
    (tmp_path / "VOC/Annotations/a.xml").unlink()
    (tmp_path / "VOC/Annotations/a.xml").symlink_to(tmp_path / "outside.xml")
    assert "Annotations/a.xml leads out of" in fault_of(open_layout(Place(tmp_path / "VOC")))
    (row,) = open_layout(Place(tmp_path / "VOC", root=tmp_path)).rows
    assert (row["image"], row["objects"]["labels"]) == ("VOC/JPEGImages/a.jpg", ["secret"])


def test_names_of_a_list_can_not_leave_the_folder(voc, tmp_path):
    (tmp_path / "outside.xml").write_text(xml(thing("secret")))
    files = {"Annotations/a.xml": xml(), "ImageSets/Main/train.txt": "../../outside\n"}
    assert "leads out of" in fault_of(voc(files))


def test_a_folder_of_several_sets(voc, tmp_path):
    with pytest.raises(DataError, match=r"name one: .*VOC2007, .*VOC2012"):
        voc({"VOC2007/Annotations/a.xml": xml(), "VOC2012/Annotations/a.xml": xml()})


@pytest.mark.parametrize("files", [{}, {"Annotations/readme.txt": ""}, {"cat/a.png": ""}])
def test_other_folders_are_not_voc(voc, files):
    assert voc(files, ["JPEGImages/a.jpg"]) is None
