"""Bad pictures and boxes as a user meets them: exit status 2, all of them at once, nothing left behind. Odd ones,
which are read."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import fasttune
from fasttune.cli import main

GOOD = {"boxes": [[4, 4, 24, 20]], "labels": ["cat"]}
COMMANDS = ("check", "run", "evaluate", "predict")


def picture(size=(96, 64), mode="RGB"):
    shades = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(shades).convert(mode)


def encoded(image, form, **settings):
    out = io.BytesIO()
    image.save(out, form, **settings)
    return out.getvalue()


def turned():
    """EXIF says: a quarter to the right; it is seen as 64 x 96."""
    tags = Image.Exif()
    tags[0x0112] = 6
    return encoded(picture(), "JPEG", exif=tags)


def bomb():
    """The header of a PNG of 30,000 x 30,000 pixels, and few bytes."""

    def chunk(name, held):
        return struct.pack(">I", len(held)) + name + held + struct.pack(">I", zlib.crc32(name + held))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


BAD_FILES = {
    "half.png": (encoded(picture((300, 200)), "PNG")[:9000], ("can't be decoded", "truncated")),
    "half.jpg": (encoded(picture((300, 200)), "JPEG")[:9000], ("can't be decoded", "truncated")),
    "empty.png": (b"", ("'pictures/empty.png' is empty",)),
    "text.png": (b"this is no picture\n", ("not an image that Pillow can read",)),
    "bomb.png": (bomb(), ("30000 x 30000 pixels", "data.max_pixels")),
    "missing.png": (None, ("no file 'pictures/missing.png'",)),
    "../../out.png": (None, ("leads out of", "data.root")),
}
ODD_FILES = {
    "one.png": (encoded(picture((1, 1)), "PNG"), [0, 0, 1, 1]),
    "flat.png": (encoded(picture((900, 4)), "PNG"), [0, 0, 9, 4]),
    "sixteen.png": (encoded(Image.fromarray(np.full((64, 96), 40000, np.uint16)), "PNG"), [4, 4, 24, 20]),
    "cmyk.jpg": (encoded(picture(mode="CMYK"), "JPEG"), [4, 4, 24, 20]),
    "palette.png": (encoded(picture(mode="P"), "PNG"), [4, 4, 24, 20]),
    "clear.png": (encoded(picture(mode="RGBA"), "PNG"), [4, 4, 24, 20]),
    "turned.jpg": (turned(), [4, 4, 60, 90]),  # only upright is it as high as that
}
NAN = float("nan")
BAD_OBJECTS = {
    "turned around": (
        {"boxes": [[24, 4, 4, 20]], "labels": ["cat"]},
        ("right edge at 4 before its left edge at 24",),
    ),
    "upside down": ({"boxes": [[4, 20, 24, 4]], "labels": ["cat"]}, ("bottom edge at 4 before its top edge",)),
    "no width": ({"boxes": [[4, 4, 4, 20]], "labels": ["cat"]}, ("no area, 0 x 16 pixels",)),
    "outside": (
        {"boxes": [[50, 30, 140, 60]], "labels": ["cat"]},
        ("44 pixels beyond the right edge of the 96 x 64",),
    ),
    "nan": ({"boxes": [[4, 4, NAN, 20]], "labels": ["cat"]}, ("expected finite numbers",)),
    "text": ({"boxes": [[4, 4, "x", 20]], "labels": ["cat"]}, ("holds 'x', which is not a number",)),
    "xywh read as xyxy": (
        {"boxes": [[50, 20, 40, 30], [5, 5, 40, 30]], "labels": ["cat"] * 2},
        ("box 1 of 2", "All boxes of this image are good as xywh", "options.box_format"),
    ),
    "three numbers": ({"boxes": [[4, 4, 24]], "labels": ["cat"]}, ("expected four numbers, found [4, 4, 24]",)),
    "fractions": ({"boxes": [[0.1, 0.1, 0.3, 0.4]], "labels": ["cat"]}, ("as in fractions", "cxcywh")),
    "null": (None, ("nothing (null)", '{"boxes": [], "labels": []}')),
    "a label missing": ({"boxes": [[4, 4, 24, 20]], "labels": []}, ("1 boxes and 0 labels",)),
    "a null label": ({"boxes": [[4, 4, 24, 20]], "labels": [None]}, ("expected a class", "found none")),
    "another size": ({**GOOD, "size": [64, 96]}, ("expected an image of 64 x 96", "96 x 64", "EXIF rotation")),
    "resized": ({**GOOD, "size": [192, 128]}, ("expected an image of 192 x 128", "was it resized")),
}


@pytest.fixture
def table(tmp_path):
    """table(name, [(file, bytes or None, objects)]) -> a jsonl file; six good rows come first. None: no file."""

    def make(name, rows):
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        good = [(f"good {i}.png", encoded(picture(), "PNG"), GOOD) for i in range(6)]
        lines = []
        for file, held, objects in [*good, *rows]:
            if held is not None:
                (folder / file).write_bytes(held)
            lines.append(json.dumps({"image": f"pictures/{file}", "objects": objects}) + "\n")
        path = tmp_path / name
        path.write_text("".join(lines))
        return str(path)

    return make


@pytest.fixture
def command(make_model, table, tmp_path):
    """command("check", rows, valid=…) -> click's result. A run is there for evaluate and predict."""
    good = table("good.jsonl", [])
    model = make_model(tmp_path / "model", "yolos")

    def trained():
        if not (tmp_path / "trained").exists():
            fasttune.finetune(
                task="object-detection",
                model=model,
                data={"train": good, "valid": good},
                strategy="full",
                options={"threshold": 0.0},
                train={"steps": 1, "batch": 2, "precision": "fp32"},
                output=str(tmp_path / "trained"),
                quiet=True,
            )
        return str(tmp_path / "trained")

    def call(name, rows, *more, valid=good):
        if name in ("check", "run"):
            output = ["--output", str(tmp_path / "output")]
            arguments = [name, "object-detection", "--data", rows, "--valid", valid, "--model", model, *output]
        else:
            arguments = [name, trained(), "--data", rows]
        return CliRunner().invoke(main, [*arguments, *more])

    return call


def refused(result, tmp_path):
    """The message of a command that must exit with 2 and leave nothing."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("output*"))
    return result.stderr


def line_of(message, row):
    """What is said of a row; each once."""
    (line,) = [line for line in message.splitlines() if f", row {row} " in line or f", row {row}," in line]
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_all_bad_pictures_are_named_at_once(command, table, tmp_path, name):
    rows = table("rows.jsonl", [(file, held, GOOD) for file, (held, _) in BAD_FILES.items()])
    message = refused(command(name, rows), tmp_path)
    assert f"{len(BAD_FILES)} bad rows" in message
    for row, (file, (_, said)) in enumerate(BAD_FILES.items(), start=7):
        line = line_of(message, row)
        assert f"rows.jsonl, row {row}" in line
        assert "column 'image'" in line
        assert f"pictures/{file}" in line
        assert all(words in line for words in said), line


@pytest.mark.parametrize("name", COMMANDS[:3])
def test_all_bad_boxes_are_named_at_once(command, table, tmp_path, name):
    pixels = encoded(picture(), "PNG")
    rows = table(
        "rows.jsonl", [(f"{i}.png", pixels, objects) for i, (objects, _) in enumerate(BAD_OBJECTS.values())]
    )
    message = refused(command(name, rows), tmp_path)
    assert f"{len(BAD_OBJECTS)} bad rows" in message
    for row, (_, said) in enumerate(BAD_OBJECTS.values(), start=7):
        line = line_of(message, row)
        assert f"row {row} (pictures/{row - 7}.png), column 'objects'" in line
        assert all(words in line for words in said), line


def test_who_predicts_needs_no_good_boxes(command, table):
    rows = table("rows.jsonl", [("bad.png", encoded(picture(), "PNG"), BAD_OBJECTS["nan"][0])])
    result = command("predict", rows)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 7


def test_odd_pictures_are_read_and_drawn(command, table, tmp_path):
    """1 x 1, flat, 16 bits, CMYK, a palette, transparency, EXIF rotation."""
    rows = [(file, held, {"boxes": [box], "labels": ["cat"]}) for file, (held, box) in ODD_FILES.items()]
    path = table("odd.jsonl", rows)
    checked = command("check", path, "--draw", str(tmp_path / "sheet.png"))
    assert checked.exit_code == 0, checked.output
    assert "13 train" in checked.stdout
    drawn = command("predict", path, "--draw", str(tmp_path / "drawn"))
    assert drawn.exit_code == 0, (drawn.output, drawn.exception)
    sizes = [json.loads(line)["size"] for line in drawn.stdout.splitlines()]
    assert sizes[6:8] == [[1, 1], [900, 4]]
    assert sizes[-1] == [64, 96]
    assert len(list((tmp_path / "drawn").iterdir())) == 13
    assert command("evaluate", path).exit_code == 0


@pytest.mark.parametrize("name", ["check", "run"])
def test_train_without_any_box_is_refused(command, table, tmp_path, name):
    path = table("rows.jsonl", [])
    lines = [
        {**json.loads(line), "objects": {"boxes": [], "labels": []}}
        for line in Path(path).read_text().splitlines()
    ]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(command(name, path, valid=path), tmp_path)
    assert "rows.jsonl: none of the 6 images to train on has a box" in message


def test_valid_without_boxes_has_a_loss_and_no_map(command, table):
    path = Path(table("rows.jsonl", []))
    lines = [{**json.loads(line), "objects": []} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = command("evaluate", str(path), "--json")
    metrics = json.loads(result.stdout)
    assert metrics["loss"] > 0
    assert metrics["mAP"] is None


@pytest.fixture
def coco(table, tmp_path):
    """coco(annotations, **images changed) -> a COCO file of the six good pictures, ids with gaps."""

    def make(annotations, sizes=None):
        table("good.jsonl", [])
        images = []
        for i in range(6):
            width, height = (sizes or {}).get(i, (96, 64))
            images.append({"id": 10 * i, "file_name": f"good {i}.png", "width": width, "height": height})
        categories = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 7, "name": "yak"}]
        document = {"images": images, "categories": categories, "annotations": annotations}
        path = tmp_path / "pictures" / "boxes.json"
        path.write_text(json.dumps(document))
        return str(path)

    return make


def annotation(number, image=None, category=None, bbox=(4, 4, 20, 16)):
    image = 10 * (number % 6) if image is None else image
    category = (3, 90)[number % 2] if category is None else category
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox)}


def test_gaps_in_category_ids_and_classes_without_boxes(command, coco):
    path = coco([annotation(i) for i in range(6)])
    result = command("check", path, valid=path)
    assert result.exit_code == 0, result.output
    assert "cat: 3 times" in result.stdout
    assert "dog: 3 times" in result.stdout
    (note,) = [line for line in result.stdout.splitlines() if "no object" in line]  # of train, not of valid
    assert "1 of the 3 classes that it names have no object: yak" in note


def test_all_bad_annotations_are_named_at_once(command, coco, tmp_path):
    bad = [
        annotation(50, 0, category=4),
        annotation(51, 12345),
        annotation(52, 20, bbox=(4, 4, 0, 16)),
        annotation(53, 30, bbox=(4, 4, NAN, 16)),
        annotation(54, 40, bbox=(50, 30, 95, 63)),
    ]
    path = coco([*(annotation(i) for i in range(6)), *bad], sizes={1: (64, 96), 5: (500, 400)})
    message = refused(command("check", path, valid=path), tmp_path)
    for row, file, said in (
        (1, 0, "annotation 50: category_id 4 is not among the 3 classes: 3 (cat), 90 (dog), 7 (yak)"),
        (2, 1, "expected an image of 64 x 96, as the data state, found one of 96 x 64"),
        (3, 2, "annotation 52: bbox [4, 4, 0, 16]: expected a width and a height above 0"),
        (4, 3, "annotation 53: bbox: expected [left, top, width, height], four finite numbers"),
        (
            5,
            4,
            "annotation 54: bbox [50, 30, 95, 63] leaves the image of 96 x 64; is it [left, top, right, bottom]?",
        ),
        (6, 5, "expected an image of 500 x 400"),
    ):
        assert f"boxes.json, row {row} (good {file}.png), column 'objects': {said}" in message
    assert "row 7, column 'objects': annotation 51: image_id 12345 is not the id of any" in message


def test_bad_rows_that_are_left_out_are_reported(command, table, tmp_path):
    rows = table("rows.jsonl", [("bad.png", b"", GOOD)])
    skip = ["--set", "data.on_error=skip", "--set", "data.max_skip=0.2", "--set", "train.steps=1"]
    result = command("run", rows, *skip, "--set", "strategy.kind=full")
    assert result.exit_code == 0, result.output
    (line,) = (tmp_path / "output" / "data_report.jsonl").read_text().splitlines()
    report = json.loads(line)
    assert (report["row"], report["column"], report["media"]) == (7, "image", "pictures/bad.png")
