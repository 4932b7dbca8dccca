"""Bad data is told before the first step: exit 2, where it stands, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GOOD = "".join(json.dumps({"text": f"tea {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8))


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_missing_column_names_the_nearest(
    invoke: Any, write: Any, tmp_path: Path, text: Any, refused: Any, command: str
) -> None:
    table = write(tmp_path / "train.csv", "txet,label\na,b\nc,d\n")
    arguments = text(train=table, command=command)
    if command == "check":
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Did you mean 'txet'?" in result.stderr
        return
    refused(
        *arguments,
        say=(
            "train.csv: no column for 'text'",
            "Did you mean 'txet'?",
            "Columns: txet, label",
            "data.columns.text=",
        ),
    )


def test_a_misspelt_mapping_names_the_nearest(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    table = write(tmp_path / "train.csv", "body,stars\na,b\nc,d\n")
    refused(
        *text("data.columns.text=boddy", train=table), say=("train.csv: no column 'boddy'", "Did you mean 'body'?")
    )
    refused(*text("data.columns.txt=body", train=table), say=("no role 'txt'", "Did you mean 'text'?"))


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_all_bad_texts_are_named_at_once(
    write: Any, tmp_path: Path, text: Any, refused: Any, share: float
) -> None:
    """Even if the good rows would not do for the share of valid."""
    values: list[Any] = ["fine", None, "", " \t", 7, "good"]
    rows = "".join(json.dumps({"body": v, "label": "xy"[i % 2]}) + "\n" for i, v in enumerate(values))
    table = write(tmp_path / "train.jsonl", rows)
    message = refused(
        *text("data.columns.text=body", train=table, valid=share),
        say=(
            "row 2, column 'body': expected text, found nothing (null)",
            "row 3, column 'body': expected text, found an empty string",
            "row 4, column 'body': expected text, found only blanks",
            "row 5, column 'body': expected text, found int 7",
        ),
    )
    assert message.count("train.jsonl, row ") >= 4
    assert "row 1," not in message
    assert "row 6," not in message


def test_bad_rows_of_train_and_valid_come_together(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    train = write(tmp_path / "train.csv", 'text,label\nfine,a\n"",b\nfine,\nwell,b\n')
    valid = write(tmp_path / "valid.csv", 'text,label\nfine,a\n"  ",b\n')
    refused(
        *text(train=train, valid=valid),
        say=(
            "3 bad rows",
            "train.csv, row 2, column 'text'",
            "train.csv, row 3, column 'label': expected a class, found none",
            "valid.csv, row 2, column 'text'",
            "data.on_error=skip",
        ),
    )


def test_a_long_list_of_bad_rows_is_cut_and_counted(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    table = write(tmp_path / "train.csv", "text,label\n" + "ok,a\nok,b\n" + ",a\n" * 50)
    message = refused(*text(train=table, valid=0.1), say=("50 bad rows", "… and 30 more"))
    assert message.count("train.csv, row ") == 20


def test_a_label_that_train_lacks(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    rows = '{"text": "tea", "label": "drink"}\n{"text": "saw", "label": "tols"}\n'
    valid = write(tmp_path / "valid.jsonl", rows)
    refused(
        *text(valid=valid),
        say=("valid.jsonl, row 2, column 'label'", "'tols' is not among the 3 of train", "Did you mean 'tool'?"),
    )


def test_float_labels_in_jsonl(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    rows = "".join(json.dumps({"text": f"t {i}", "label": i / 2}) + "\n" for i in range(4))
    refused(
        *text(train=write(tmp_path / "train.jsonl", rows), valid=0.25),
        say=("row 1, column 'label': expected a class", "the float 0.0", "the float 1.5"),
    )


def test_float_labels_in_csv(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    table = write(tmp_path / "train.csv", "text,label\na,3.5\nb,1.0\nc,2\nd,\n")
    refused(
        *text(train=table, valid=0.25),
        say=(
            "row 1, column 'label': expected a class",
            "the float 3.5",
            "row 4, column 'label': expected a class",
        ),
    )


@pytest.mark.parametrize("label", [True, {"name": "a"}, ["a"]])
def test_labels_of_other_types(invoke: Any, write: Any, tmp_path: Path, text: Any, label: Any) -> None:
    """true and false are class names; lists and objects are not."""
    rows = [{"text": f"t {i}", "label": label} for i in range(4)]
    rows += [{"text": f"u {i}", "label": False if label is True else label} for i in range(4)]
    table = write(tmp_path / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*text(train=table, valid=table), "--output", str(tmp_path / "run"), "--set", "train.steps=1"]
    result = invoke(*arguments)
    if label is True:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 2
        assert "row 1, column 'label': expected a class" in result.stderr


def test_labels_of_mixed_types(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    rows = '{"text": "a", "label": "x"}\n{"text": "b", "label": 1.5}\n{"text": "c", "label": ["y"]}\n'
    refused(
        *text(train=write(tmp_path / "train.jsonl", rows)),
        say=("row 2, column 'label': expected a class", "row 3, column 'label': expected a class"),
    )


def test_one_class_only(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    table = write(tmp_path / "train.csv", "text,label\na,only\nb,only\nc,only\n")
    refused(*text(train=table, valid=table), say=("train.csv", "at least two classes", "only 'only'"))


def test_bad_numbers_for_a_regression(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    table = write(tmp_path / "train.csv", "text,score\na,1.5\nb,high\nc,\nd,nan\ne,inf\n")
    refused(
        *text("options.problem=regression", train=table, valid=table),
        say=("row 2, column 'score': expected a number, found 'high'", "row 3", "row 4", "row 5"),
    )


BROKEN_FILES = {
    "empty.jsonl": (b"", ("empty.jsonl: the file is empty",)),
    "empty.csv": (b"", ("empty.csv: the file is empty",)),
    "blank.csv": (b"\n\n", ("blank.csv",)),
    "header.csv": (b"text,label\n", ("header.csv: has a header and no rows",)),
    "ragged.csv": (
        b"text,label\na,b\nan unquoted, comma,b\nc\n",
        ("ragged.csv, line 3: expected 2 fields as in the header, found 3", "ragged.csv, line 4", "double quotes"),
    ),
    "twice.csv": (b"text,label,text\na,b,c\n", ("twice.csv: the header is wrong: 'text' stands twice",)),
    "broken.jsonl": (
        (GOOD + '{"text": "a", "label": "b"\n' + GOOD + "what?\n[1]\n\n").encode(),
        (
            "broken.jsonl, line 9: broken JSON",
            "broken.jsonl, line 18: broken JSON",
            "line 19: expected a JSON object, found list",
            "line 20: is blank",
        ),
    ),
    "array.json": (b'[{"text": "a",\n "label": "b"},\n {"text" "c"}]', ("array.json, line 3: broken JSON",)),
    "words.json": (b'["a", "b"]', ("words.json: expected an array of objects",)),
    "nothing.json": (b"[]", ("nothing.json",)),
    "latin.csv": ("text,label\nTee,a\nKäse,b\n".encode("latin-1"), ("latin.csv, line 3: not UTF-8 text", "0xe4")),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "K\xe4se"}\n', ("latin.jsonl, line 2: not UTF-8 text: byte 0xe4",)),
    "utf16.csv": ("text,label\na,b\n".encode("utf-16"), ("utf16.csv, line 1: not UTF-8 text",)),
    "rows.xlsx": (b"PK\x03\x04", ("rows.xlsx: format '.xlsx' is not known", ".csv")),
    "rows": (b"text,label\na,b\n", ("format 'without a suffix' is not known",)),
    "noise.parquet": (b"PAR1 this is no parquet file PAR1", ("noise.parquet: can't be read",)),
    "noise.arrow": (b"this is no arrow file either", ("noise.arrow: can't be read",)),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_files_that_can_not_be_read(write: Any, tmp_path: Path, text: Any, refused: Any, name: str) -> None:
    content, say = BROKEN_FILES[name]
    refused(*text(train=write(tmp_path / name, content)), say=say)


@pytest.mark.parametrize("name", ["none.csv", "no/such.jsonl", "/no/such/folder"])
def test_data_that_is_not_there(text: Any, refused: Any, name: str) -> None:
    refused(*text(train=name), say=(f"{name}: no such file or folder",))
    refused(*text(valid=name), say=(f"{name}: no such file or folder",))


def test_a_hub_id_that_can_not_be_reached(text: Any, refused: Any) -> None:
    refused(*text(train="nobody/nothing"), say=("nobody/nothing", "taken for a hub id", "can't be read"))


def test_a_folder_where_a_table_is_wanted(tmp_path: Path, text: Any, refused: Any) -> None:
    refused(*text(train=tmp_path), say=("is a folder; expected a table: .csv",))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images in each of two class folders."""
    from PIL import Image

    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.effect_noise((40, 30 + i), 50 + number).convert("RGB")
            picture.save(tmp_path / "pictures" / name / f"{i}.jpg")
    return tmp_path / "pictures"


@pytest.fixture
def image(tiny_vit: Path, pictures: Path) -> list[str]:
    """A command line for image-classification on `pictures`."""
    data = ["--data", str(pictures), "--valid", str(pictures)]
    return ["run", "image-classification", "--model", str(tiny_vit), *data, "--set", "train.steps=1"]


def test_all_bad_images_are_named_at_once(write: Any, pictures: Path, image: list[str], refused: Any) -> None:
    whole = (pictures / "cat" / "0.jpg").read_bytes()
    write(pictures / "cat" / "empty.png", b"")
    write(pictures / "cat" / "truncated.jpg", whole[: len(whole) // 2])
    write(pictures / "dog" / "corrupt.png", b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    write(pictures / "dog" / "text.png", "these are words")
    message = refused(
        *image,
        say=(
            "8 bad rows",  # four in train, and the same in valid
            "column 'image': the file 'cat/empty.png' is empty",
            "'truncated.jpg' can't be decoded",
            "'corrupt.png'",
            "'text.png' is not an image",
        ),
    )
    assert "0.jpg" not in message


def test_an_image_that_expands_too_much(pictures: Path, image: list[str], refused: Any) -> None:
    refused(*image, "--set", "data.max_pixels=1230", say=("'2.jpg' has 40 x 32 pixels", "data.max_pixels 1230"))


def test_a_file_of_another_kind_among_images(write: Any, pictures: Path, image: list[str], refused: Any) -> None:
    write(pictures / "dog" / "notes.txt", "not an image")
    refused(*image, say=("1 files are no image files", "dog/notes.txt"))


def test_a_folder_without_images(write: Any, tmp_path: Path, image: list[str], refused: Any) -> None:
    write(tmp_path / "texts" / "a" / "notes.txt", "words")
    refused(*image, "--data", str(tmp_path / "texts"), say=("expected a folder a class with image files",))


def test_a_folder_that_holds_splits(pictures: Path, tmp_path: Path, image: list[str], refused: Any) -> None:
    pictures.rename(tmp_path / "whole")
    pictures.mkdir()
    (tmp_path / "whole").rename(pictures / "train")
    refused(*image, say=("holds splits, not classes; name one of them", "pictures/train"))


@pytest.mark.parametrize("path", ["../secret.png", "none.png", "", "/etc/hostname"])
def test_paths_of_images_in_a_table(
    write: Any, tmp_path: Path, pictures: Path, image: list[str], refused: Any, path: str
) -> None:
    (tmp_path / "secret.png").write_bytes((pictures / "cat" / "0.jpg").read_bytes())
    rows = f'file_name,label\ncat/0.jpg,cat\ndog/0.jpg,dog\n"{path}",dog\n'
    table = str(write(pictures / "table.csv", rows))
    said = {"none.png": "no file 'none.png'", "": "expected a path"}.get(path, f"the path {path!r} leads out of")
    refused(*image, "--data", table, "--valid", table, say=("table.csv, row 3, column 'file_name'", said))


def test_a_bad_image_can_be_left_out(
    invoke: Any, write: Any, tmp_path: Path, pictures: Path, image: list[str]
) -> None:
    write(pictures / "dog" / "text.png", "these are words")
    skip = ["--set", "data.on_error=skip", "--set", "data.max_skip=0.5", "--output", str(tmp_path / "run")]
    result = invoke(*image, *skip)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_rows"] == 6


def test_skipping_has_a_limit(write: Any, tmp_path: Path, text: Any, refused: Any) -> None:
    table = write(tmp_path / "train.jsonl", GOOD + '{"text": "", "label": "a"}\n')
    arguments = text("data.on_error=skip", train=table, valid=table)
    refused(*arguments, say=("row 9, column 'text'", "more than data.max_skip 1.0% of 18 rows"))


def test_skipped_rows_are_left_out_and_listed(invoke: Any, write: Any, tmp_path: Path, text: Any) -> None:
    table = write(tmp_path / "train.jsonl", GOOD + '{"text": "", "label": "a"}\n')
    valid = write(tmp_path / "valid.jsonl", GOOD + '{"text": "tea", "label": "strange"}\n')
    arguments = text("data.on_error=skip", "data.max_skip=0.2", "train.steps=1", train=table, valid=valid)
    result = invoke(*arguments, "--output", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "2 bad rows left out" in result.stderr
    listed = [json.loads(line) for line in (tmp_path / "run" / "data_report.jsonl").read_text().splitlines()]
    assert [(Path(bad["file"]).name, bad["row"], bad["column"]) for bad in listed] == [
        ("train.jsonl", 9, "text"),
        ("valid.jsonl", 9, "label"),
    ]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["train_rows"], metrics["valid_rows"]) == (8, 8)
