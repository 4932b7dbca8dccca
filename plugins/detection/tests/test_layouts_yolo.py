"""YOLO's folders become rows: splits as named, twins found, every bad line named by file and number."""

from __future__ import annotations

import pytest

from fasttune.errors import DataError
from fasttune.layouts import Place
from fasttune_detection.layouts import open_layout

DATA = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"


@pytest.fixture
def yolo(tmp_path):
    """yolo({"images/train/a.png": "…"}, data) -> the opened split; texts of images don't matter."""

    def opened(files, data=DATA, *, split="train", root=None, place="set/data.yaml"):
        for name, text in {"data.yaml": data, **files}.items():
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return open_layout(Place(tmp_path / place, split, root=root))

    return opened


def labels(text, *more):
    """Files of one training image with these lines, and of one beside it with a good line."""
    return {
        "images/train/a.png": "",
        "labels/train/a.txt": text,
        "images/train/b.png": "",
        "labels/train/b.txt": "1 0.5 0.5 1 1",
    }


def test_classes_that_nothing_has_are_said_of_train_alone(yolo):
    files = {
        **labels("1 0.5 0.5 1 1"),
        "images/val/c.png": "",
        "labels/val/c.txt": "1 0.5 0.5 1 1",
    }
    said = "1 of the 2 classes that it names have no object: cat; a model that is trained on it won't know them"
    assert said in yolo(files).notes
    assert not any("no object" in note for note in yolo(files, split="validation").notes)
    both = {**files, **labels("0 0.5 0.5 1 1")}
    assert not any("no object" in note for note in yolo(both).notes)


def test_rows_keep_fractions_and_bear_names(yolo, tmp_path):
    opened = yolo(
        {
            "images/train/b.JPG": "",
            "labels/train/b.txt": "1 0.5 0.25 0.1 0.2\n\n  0\t.5 5e-1 1.0 1\n",
            "images/train/a.png": "",
            "images/train/deep/c.png": "",
            "labels/train/deep/c.txt": "",
            "images/train/notes.txt": "no image",
            "images/train/.hidden.png": "",
            "images/val/d.png": "",
        }
    )
    assert opened.rows == [
        {"image": "images/train/a.png", "objects": {"boxes": [], "labels": [], "format": "cxcywh"}},
        {
            "image": "images/train/b.JPG",
            "objects": {
                "boxes": [[0.5, 0.25, 0.1, 0.2], [0.5, 0.5, 1.0, 1.0]],
                "labels": ["dog", "cat"],
                "format": "cxcywh",
            },
        },
        {"image": "images/train/deep/c.png", "objects": {"boxes": [], "labels": [], "format": "cxcywh"}},
    ]
    assert (opened.split, opened.splits, opened.root) == ("train", ("train", "val"), tmp_path / "set")
    assert opened.notes == ("1 of 3 images have no file of labels: no boxes",)


@pytest.mark.parametrize("place", ["set/data.yaml", "set"])
@pytest.mark.parametrize(
    ("split", "image"), [("train", "a"), ("validation", "b"), ("val", "b"), ("test", "c"), ("extra", None)]
)
def test_splits(yolo, place, split, image):
    files = {f"images/{folder}/{name}.png": "" for folder, name in (("train", "a"), ("val", "b"), ("test", "c"))}
    data = DATA + "test: images/test\n"
    if image:
        assert [row["image"][-5] for row in yolo(files, data, split=split, place=place).rows] == [image]
    else:
        with pytest.raises(DataError, match=r"no split 'extra'.* Name one: .*:train, .*:val, .*:test"):
            yolo(files, data, split=split, place=place)


def test_a_split_that_is_not_named_is_not_there(yolo):
    """An empty entry, as templates leave it, is none."""
    with pytest.raises(DataError, match=r"no split 'test'"):
        yolo(labels(""), DATA + "test:\n", split="test")


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "{'1': dog, '0': cat}", "\n  - cat\n  - dog"])
def test_names_as_list_or_mapping(yolo, names):
    opened = yolo(labels("0 .5 .5 .1 .1"), f"train: images/train\nnc: 2\nnames: {names}\n")
    assert [row["objects"]["labels"] for row in opened.rows] == [["cat"], ["dog"]]


def test_names_with_gaps_digits_and_twins(yolo):
    data = "train: images/train\nnames: {3: 5, 1: cat, 8: cat}\n"
    opened = yolo(labels("3 .5 .5 .1 .1\n8 .5 .5 .1 .1"), data)
    assert [row["objects"]["labels"] for row in opened.rows] == [["5", "cat"], ["cat"]]
    assert opened.notes == ("class ids 1, 8 are all named 'cat' and become one class",)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("0 0.5 0.5 0.1", "found 4 values"),
        ("0 0.5 0.5 0.1 0.1 0.9", "found 6 values"),
        ("0 0.5 0.5 0.1 x", "all numbers; found 'x'"),
        ("0 0.5 0.5 0.1 nan", "all numbers; found 'nan'"),
        ("0 0.5 0.5 0.1 1_0", "all numbers; found '1_0'"),
        ("0,0.5,0.5,0.1,0.1", "all numbers; found '0,0.5"),
        ("cat 0.5 0.5 0.1 0.1", "all numbers; found 'cat'"),
        ("2 0.5 0.5 0.1 0.1", "class 2 is not among the 2 classes: 0 (cat), 1 (dog)"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is not among"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is not among"),
        ("0 320 240 64 48", "expected fractions of the image, 0 to 1, found 320"),
        ("0 0.5 0.5 0 0.1", "a size above 0"),
        ("0 0.5 0.5 0.1 -0.1", "a size above 0"),
        ("0 -0.5 0.5 0.1 0.1", "a centre inside the image"),
        ("0 0.1 0.1 0.5 0.1 0.9 0.1", "a size above 0"),
    ],
)
def test_a_bad_line_is_named(yolo, line, why):
    opened = yolo(labels(f"0 .5 .5 .1 .1\n\n{line}\n1 .5 .5 .1 .1\n"))
    fault = opened.rows[0]["objects"]
    assert isinstance(fault, DataError)
    assert fault.column == "objects"
    assert fault.why.startswith("labels/train/a.txt, line 3: ")
    assert why in fault.why
    assert opened.rows[0]["image"] == "images/train/a.png"
    assert opened.rows[1]["objects"]["labels"] == ["dog"]


@pytest.mark.parametrize(
    "line", ["0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6", "0 0.3 0.2 0.5 0.4 0.1 0.6", "0 .5 .2 .5 .6 .1 .4 .3 .3"]
)
def test_polygons_give_their_bounding_box_and_are_counted(yolo, line):
    opened = yolo(labels(line))
    assert opened.rows[0]["objects"]["boxes"][0] == pytest.approx([0.3, 0.4, 0.4, 0.4])
    assert opened.notes == ("1 of 2 lines are polygons; their bounding boxes are taken",)


def test_keypoints_are_no_polygons(yolo):
    data = "train: images/train\nkpt_shape: [1, 2]\nnames: [cat, dog]\n"
    opened = yolo(labels("0 0.5 0.5 0.2 0.2 0.9 0.9"), data)
    assert opened.rows[0]["objects"]["boxes"] == [[0.5, 0.5, 0.2, 0.2]]
    assert not opened.notes


def test_labels_that_are_no_text(yolo, tmp_path):
    files = labels("")
    yolo(files)
    (tmp_path / "set/labels/train/a.txt").write_bytes(b"\xff\xfe0 .5")
    (tmp_path / "set/labels/train/b.txt").unlink()
    (tmp_path / "set/labels/train/b.txt").mkdir()
    opened = open_layout(Place(tmp_path / "set"))
    assert "labels/train/a.txt: not UTF-8 text at byte 0" in opened.rows[0]["objects"].why
    assert "labels/train/b.txt: is no file" in opened.rows[1]["objects"].why


def test_without_any_labels_rows_have_no_objects(yolo):
    opened = yolo({"images/train/a.png": "", "images/train/b.png": ""})
    assert opened.rows == [{"image": "images/train/a.png"}, {"image": "images/train/b.png"}]
    assert opened.notes == ("no image has a file of labels; the first would be labels/train/a.txt",)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.png", "labels/train/a.txt"),
        ("train/images/a.png", "train/labels/a.txt"),
        ("images/images/a.png", "images/labels/a.txt"),
        ("train/a.png", "train/a.txt"),
        ("images.of/a.b.png", "images.of/a.b.txt"),
    ],
)
def test_the_twin_of_an_image(yolo, image, label):
    opened = yolo({image: "", label: "0 .5 .5 .1 .1"}, f"train: {image.rpartition('/')[0]}\nnames: [cat]\n")
    assert opened.rows[0]["objects"]["labels"] == ["cat"]


def test_several_folders_and_lists_of_images(yolo):
    files = {f"images/{name}.png": "" for name in ("one/b", "one/a", "two/c", "d", "e")}
    files["lists/some.txt"] = "images/e.png\n\n./../images/d.png\n"
    opened = yolo(files, "train: [images/two, lists/some.txt, images/one]\nnames: [cat]\n")
    names = ["images/two/c.png", "images/e.png", "lists/../images/d.png", "images/one/a.png", "images/one/b.png"]
    assert [row["image"] for row in opened.rows] == names


def test_roboflow_writes_one_folder_too_many(yolo):
    data = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\n"
    opened = yolo({"train/images/a.png": "", "train/labels/a.txt": "0 .5 .5 .1 .1"}, data)
    assert opened.rows[0]["objects"]["labels"] == ["cat"]
    assert opened.notes == ("'../train/images' is not there; train/images is taken",)


@pytest.mark.parametrize("path", ["/home/nobody/sets/pets", "../datasets/pets", "pets"])
def test_a_path_of_another_machine(yolo, path):
    opened = yolo(labels(""), DATA.replace("path: .", f"path: {path}"))
    assert len(opened.rows) == 2
    assert opened.notes[0] == f"path {path!r} is no folder here; that of data.yaml is taken"


def test_a_path_inside_the_folder(yolo, tmp_path):
    files = {f"pets/{name}": text for name, text in labels("0 .5 .5 .1 .1").items()}
    for path in ("pets", str(tmp_path / "set" / "pets")):
        opened = yolo(files, DATA.replace("path: .", f"path: {path}"))
        assert opened.rows[0]["image"] == "pets/images/train/a.png"
        assert opened.rows[0]["objects"]["labels"] == ["cat"]


@pytest.mark.parametrize("how", ["path", "entry", "list", "absolute", "link"])
def test_nothing_is_read_outside_the_root(yolo, tmp_path, how):
    outside = tmp_path / "outside" / "images"
    outside.mkdir(parents=True)
    (outside / "a.png").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "list.txt").write_text("secret\n")
    data = {
        "path": "path: ../outside\ntrain: images",
        "entry": "train: ../outside/images",
        "list": "train: ../outside/list.txt",
        "absolute": f"train: {outside}",
        "link": "train: linked/images",
    }[how]
    with pytest.raises(DataError, match=r"leads out of .*set; data\.root") as refused:
        yolo({}, f"{data}\nnames: [cat]\n")
    assert "secret" not in str(refused.value)
    if how in ("path", "entry", "absolute"):
        opened = yolo({}, f"{data}\nnames: [cat]\n", root=tmp_path)
        assert (tmp_path / opened.rows[0]["image"]).resolve() == outside / "a.png"


def test_labels_are_not_read_outside_the_root(yolo, tmp_path):
    (tmp_path / "secret").write_text("root:x:0:0\n")
    yolo(labels(""))
    (tmp_path / "set/labels/train/a.txt").unlink()
    (tmp_path / "set/labels/train/a.txt").symlink_to(tmp_path / "secret")
    fault = open_layout(Place(tmp_path / "set")).rows[0]["objects"].why
    assert "labels/train/a.txt leads out of" in fault
    assert "root:x" not in fault


def test_a_link_to_the_file_itself_is_the_users_choice(yolo, tmp_path):
    yolo(labels("0 .5 .5 .1 .1"))
    (tmp_path / "set/data.yaml").rename(tmp_path / "shared.yaml")
    (tmp_path / "set/data.yaml").symlink_to(tmp_path / "shared.yaml")
    assert len(open_layout(Place(tmp_path / "set/data.yaml")).rows) == 2


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("train: [a\nnames: [cat]", r"data\.yaml, line 2: not valid YAML"),
        ("train: images/train\nnames: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine"),
        ("train: 2024-13-45\nnames: [cat]", "not valid YAML: month must be"),
        ("- a\n- b", "expected train, val and names, found list"),
        ("train: images/train\nnc: 2", "expected train, val and names, found train, nc"),
        ("names: [cat]", "names no split"),
        ("train: images/train\nnames: cat", "names: expected a list or a mapping of class names, found 'cat'"),
        ("train: images/train\nnames: []", "names: expected a list or a mapping"),
        ("train: images/train\nnames: [yes, no]", "names: 0: expected a name, found True; write it in quotes"),
        ("train: images/train\nnames: [cat, 1.5]", "names: 1: expected a name, found 1.5"),
        ("train: images/train\nnames: {a: cat}", "whole numbers from 0, each once, found 'a'"),
        ("train: images/train\nnames: {-1: cat}", "whole numbers from 0, each once, found -1"),
        ("train: images/train\nnames: {0: cat, '0': dog}", "whole numbers from 0, each once, found '0'"),
        ("train: images/train\nnc: 3\nnames: [cat, dog]", "nc is 3, and there are 2 names"),
        ("train: images/nowhere\nnames: [cat]", "no such folder or file: .*images/nowhere"),
        ("train: images\nnames: [cat]", r"no image \(\.bmp"),
        ("train: 3\nnames: [cat]", "expected a folder of images, found 3"),
        ("train: data.yaml\nnames: [cat]", r"a \.txt file that lists them, found 'data\.yaml'"),
        ("path: 3\ntrain: images\nnames: [cat]", "path: expected a folder, found 3"),
        ("kpt_shape: 3\ntrain: images/train\nnames: [cat]", "kpt_shape: expected two whole numbers, found 3"),
    ],
)
def test_a_file_that_is_broken_as_a_whole(yolo, data, why):
    files = {"images/.keep": ""} if data.startswith("train: images\n") else labels("")
    with pytest.raises(DataError, match=why):
        yolo(files, data)


def test_yaml_that_expands_without_end(yolo):
    """Each line ten times the one before: what is said of it must not be written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for key in ("train", "path", "names", "nc"):
        text = "\n".join([*lines, f"{key}: *a11"])
        rest = "".join(
            f"\n{name}: {value}" for name, value in (("train", "images"), ("names", "[cat]")) if name != key
        )
        with pytest.raises(DataError, match="list"):
            yolo(labels(""), text + rest)


def test_folders_without_a_class_list(tmp_path):
    for twin in ("images", "labels"):
        (tmp_path / twin).mkdir()
    with pytest.raises(DataError, match=r"no data\.yaml that names the classes"):
        open_layout(Place(tmp_path))
