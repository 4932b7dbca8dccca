"""Tables of every format come out as the same rows; what people write in them stays as it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune.readers import Table, read

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "label": "a"},
    {"text": 'with "quotes", commas\nand a second line', "label": "b"},
    {"text": "Äpfel, 梨, 🍐", "label": "a"},
    {"text": " spaces ", "label": "NA"},
]


def as_delimited(path: Path, delimiter: str) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_arrow_stream(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def as_arrow_file(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def as_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def as_saved_dataset(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.csv": lambda path: as_delimited(path, ","),
    "rows.tsv": lambda path: as_delimited(path, "\t"),
    "ROWS.CSV": lambda path: as_delimited(path, ","),
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "rows.ndjson": lambda path: path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "rows.parquet": as_parquet,
    "stream.arrow": as_arrow_stream,
    "file.arrow": as_arrow_file,
    "saved": as_saved_dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    table = read(str(path))
    assert table.name == str(path)
    assert table.columns == ["text", "label"]
    assert list(table.dataset) == ROWS
    assert table.text_only == (path.suffix.lower() in (".csv", ".tsv"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    table = read(str(path))
    assert table.columns == ["text", "label"]
    assert list(table.dataset) == ROWS


def test_windows_line_ends_and_blank_lines_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,label\r\none,a\r\n\r\n"two\r\nlines",b\r\n\r\n')
    rows = list(read(str(path)).dataset)
    assert [row["label"] for row in rows] == ["a", "b"]
    assert rows[1]["text"].split() == ["two", "lines"]


@pytest.mark.parametrize(
    "value", ["NA", "null", "None", "nan", "N/A", "", "007", "1e5", "3.0", "True", " padded ", "-", "1,5", '"']
)
def test_csv_values_stay_text(tmp_path: Path, value: str) -> None:
    import csv

    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["x", value], ["y", "z"]])
    assert read(str(path)).dataset[0]["label"] == value


def test_a_field_as_long_as_a_book(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    book = "word " * 100_000
    path.write_text(f"text,label\n{book},a\nshort,b\n")
    assert read(str(path)).dataset[0]["text"] == book


def test_jsonl_with_columns_that_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": "x"}\n{"a": 2, "b": "y", "c": [1, 2]}\n')
    table = read(str(path))
    assert set(table.columns) == {"a", "b", "c"}
    assert table.dataset[0]["a"] == 1
    assert table.dataset[0]["b"] is None
    assert table.dataset[2]["c"] == [1, 2]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_columns_of_mixed_types_are_readable_and_left_to_the_task(tmp_path: Path, name: str) -> None:
    rows = [{"text": "a", "label": 1}, {"text": 2, "label": "b"}, {"text": ["c"], "label": None}]
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows))
    table = read(str(path))
    assert table.columns == ["text", "label"]
    assert [table.dataset[i] for i in range(3)] == rows


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_that_changed_is_read_anew(tmp_path: Path, suffix: str) -> None:
    """Even with its old time and length, as after `rsync -t`, `cp -p` or unpacking an archive."""
    path = tmp_path / f"rows.{suffix}"
    for word in ("old", "new"):
        path.write_text(f"text,label\n{word},a\n" if suffix == "csv" else f'{{"text": "{word}"}}\n')
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert read(str(path)).dataset[0]["text"] == word


def test_ints_and_floats_may_share_a_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"score": 1}\n{"score": 2.5}\n{"score": null}\n')
    assert [row["score"] for row in read(str(path)).dataset] == [1, 2.5, None]


@pytest.mark.parametrize("count", [1, 25])
def test_all_ragged_lines_are_named(tmp_path: Path, count: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "one\n" * count)
    with pytest.raises(DataError) as refused:
        read(str(path))
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"{path}, line 2: expected 2 fields as in the header, found 1")
    assert len(lines) == min(count, 21)
    assert lines[-1] == "… and 5 more" or count == 1


def test_a_line_number_counts_lines_inside_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"two\nlines",a\nragged\n')
    with pytest.raises(DataError, match=r"rows\.csv, line 4: "):
        read(str(path))


def test_a_home_folder_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("~/rows.csv", "rows.csv", "./rows.csv"):
        assert len(read(spec).dataset) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders with image files, one of them deeper; what lies in hidden ones is no data."""
    for name in ("cat/1.png", "cat/deep/2.JPG", "dog/3.webp", ".hidden/4.png", "dog/.hidden.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bytes")
    return tmp_path / "pictures"


def pairs(table: Table) -> set[tuple[str, str]]:
    return {(row["image"], row["label"]) for row in table.dataset}


def test_a_folder_a_class(folder: Path) -> None:
    table = read(str(folder), "image")
    assert pairs(table) == {("cat/1.png", "cat"), ("cat/deep/2.JPG", "cat"), ("dog/3.webp", "dog")}
    assert table.root == folder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_a_table_of_its_files(folder: Path, name: str) -> None:
    rows = [{"file_name": "cat/1.png", "label": "x"}, {"file_name": "dog/3.webp", "label": "y"}]
    lines = ["file_name,label", "cat/1.png,x", "dog/3.webp,y"] if name.endswith("csv") else map(json.dumps, rows)
    (folder / name).write_text("\n".join(lines) + "\n")
    table = read(str(folder), "image")
    assert list(table.dataset) == rows
    assert table.root == folder
    assert table.name == str(folder / name)


def test_a_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(b"bytes")
    with pytest.raises(DataError, match="expected a folder a class with image files"):
        read(str(tmp_path / "flat"), "image")


def test_a_saved_dataset_dict_says_which_splits_it_holds(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = DatasetDict({split: Dataset.from_list(ROWS) for split in ("train", "test")})
    whole.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"train.*test|test.*train"):
        read(str(tmp_path / "saved"))
    assert len(read(str(tmp_path / "saved" / "train")).dataset) == len(ROWS)


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    as_saved_dataset(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(DataError, match="saved: can't be read"):
        read(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("spec", "identifier", "config", "split"),
    [
        ("owner/reviews", "owner/reviews", None, "validation"),
        ("owner/reviews:test", "owner/reviews", None, "test"),
        ("glue:mrpc:train", "glue", "mrpc", "train"),
    ],
)
def test_hub_ids_name_their_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, identifier: str, config: str | None, split: str
) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None = None, split: str | None = None) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read(spec, split="validation").dataset) == len(ROWS)
    assert asked == [(identifier, config, split)]


def open_shelves(place: Place) -> Opened | None:
    """A nested layout as a task may know it."""
    if place.document is None or "shelves" not in place.document:
        return None
    shelves = place.document["shelves"]
    if not isinstance(shelves, list):
        raise DataError(None, "shelves: expected a list")
    return Opened([{"text": book, "label": shelf["label"]} for shelf in shelves for book in shelf["books"]])


SHELVES = {"version": 1, "shelves": [{"label": "a", "books": ["x", 2]}, {"label": "b", "books": ["y"]}]}


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_nested_document_becomes_rows(tmp_path: Path, indent: int | None, mark: str) -> None:
    path = tmp_path / "nested.json"
    path.write_text(mark + json.dumps(SHELVES, indent=indent), encoding="utf-8")
    table = read(str(path), opener=open_shelves)
    assert list(table.dataset) == [
        {"text": "x", "label": "a"},
        {"text": 2, "label": "a"},
        {"text": "y", "label": "b"},
    ]
    assert table.root == tmp_path


def test_other_json_files_are_read_as_ever(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for number, text in enumerate((lines, json.dumps(ROWS), json.dumps(ROWS, indent=1), json.dumps(ROWS[0]))):
        path = tmp_path / f"{number}.json"
        path.write_text(text, encoding="utf-8")
        found = list(read(str(path), opener=open_shelves).dataset)
        assert found == (ROWS[:1] if number == 3 else ROWS)
    path.write_text('{"text": "cut", "la\n{"text": "whole", "label": "a"}\n{"text"\n')
    with pytest.raises(DataError, match=r"line 1: broken JSON[\s\S]*line 3: broken JSON"):
        read(str(path), opener=open_shelves)


def test_faults_of_a_nested_document_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "nested.json"
    path.write_text(json.dumps(SHELVES, indent=1)[:-30])
    with pytest.raises(DataError, match=r"nested\.json, line \d+: broken JSON: .* at column \d+$"):
        read(str(path), opener=open_shelves)
    path.write_text(json.dumps({"shelves": 3}))
    with pytest.raises(DataError, match=r"nested\.json: shelves: expected a list"):
        read(str(path), opener=open_shelves)
    path.write_text(json.dumps({"shelves": []}))
    with pytest.raises(DataError, match="has no rows"):
        read(str(path), opener=open_shelves)


def test_json_that_is_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "nested.json"
    path.write_text('{"shelves": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"nested\.json: nested too deeply"):
        read(str(path), opener=open_shelves)


def open_pages(place: Place) -> Opened | None:
    """A folder a split, with pages of text and a file of marks beside them, as a task may know it."""
    if not (place.path / "marks").is_dir():
        return None
    splits = sorted(file.stem for file in (place.path / "marks").iterdir())
    split = place.choose(splits)
    marks = (place.path / "marks" / f"{split}.txt").read_text().split()
    rows = [
        {"image": f"pages/{number}.png", "label": DataError(None, "no mark") if mark == "-" else mark}
        for number, mark in enumerate(marks)
    ]
    return Opened(rows, place.root, split, tuple(splits), notes=(f"{len(marks)} marks",))


@pytest.fixture
def pages(tmp_path: Path) -> Callable[..., str]:
    def write(**splits: str) -> str:
        for name, marks in splits.items():
            path = tmp_path / "book" / "marks" / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(marks)
        return str(tmp_path / "book")

    return write


@pytest.mark.parametrize(
    ("split", "named", "taken"),
    [
        ("train", "", "train"),
        ("validation", "", "val2017"),
        ("train", ":val2017", "val2017"),
        ("validation", ":train", "train"),
        ("train", ":validation", "val2017"),
        ("test", ":extra-0.1", "extra-0.1"),
    ],
)
def test_a_split_is_what_was_named(pages: Any, split: str, named: str, taken: str) -> None:
    book = pages(train="a b", val2017="c", **{"extra-0.1": "d"})
    table = read(book + named, "image", split, open_pages)
    assert table.name == f"{book}:{taken}"
    assert [row["label"] for row in table.dataset] == {"train": ["a", "b"], "val2017": ["c"]}.get(taken, ["d"])
    assert table.valid == (f"{book}:val2017" if taken == "train" else None)
    assert table.root == Path(book)


@pytest.mark.parametrize(
    ("splits", "wanted", "say"),
    [
        (("train", "val"), "test", r"no split 'test'\. Name one: .*book:train, .*book:val"),
        (("train", "val"), "vall", r"no split 'vall'\. Did you mean 'val'\?"),
        (
            ("train", "val2014", "val2017"),
            "validation",
            r"several splits are for validation\. Name one: .*val2014",
        ),
        (("trainval", "test"), "train", r"no split 'train'"),
    ],
)
def test_another_split_is_never_taken(pages: Any, splits: tuple[str, ...], wanted: str, say: str) -> None:
    book = pages(**dict.fromkeys(splits, "a"))
    with pytest.raises(DataError, match=say):
        read(book, "image", wanted, open_pages)


def test_no_split_for_validation_where_train_was_not_taken_by_its_name(pages: Any) -> None:
    """trainval holds val."""
    book = pages(trainval="a b", val="b")
    assert read(f"{book}:trainval", "image", "train", open_pages).valid is None


def test_a_split_named_where_there_is_none(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    for spec, media in ((f"{tmp_path}/rows.csv:train", None), (f"{folder}:train", "image")):
        with pytest.raises(DataError, match=r"has no splits to name; leave ':train' out"):
            read(spec, media, opener=open_pages)  # type: ignore[arg-type]
    (tmp_path / "odd:name").write_text("text\na\n")
    with pytest.raises(DataError, match="format 'without a suffix' is not known"):
        read(f"{tmp_path}/odd:name")


def test_what_the_task_does_not_know_is_read_as_ever(folder: Path) -> None:
    assert pairs(read(str(folder), "image", opener=open_pages)) == pairs(read(str(folder), "image"))
    (folder / "metadata.csv").write_text("file_name,label\ncat/1.png,x\n")
    (folder / "marks").mkdir()
    assert list(read(str(folder), "image", opener=open_pages).dataset) == [
        {"file_name": "cat/1.png", "label": "x"}
    ]


def test_files_that_a_task_can_not_read_are_a_matter_of_the_data(pages: Any) -> None:
    book = pages(train="a")
    (Path(book) / "marks" / "train.txt").unlink()
    (Path(book) / "marks" / "train.txt").mkdir()
    with pytest.raises(DataError, match=r"book: can't be read: .*train\.txt"):
        read(book, "image", opener=open_pages)


def test_a_root_that_the_user_names(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "rows.csv"
    table.write_text("file_name,label\ncat/1.png,x\n")
    assert read(str(table)).root == table.parent
    assert read(str(table), root=str(folder)).root == folder
    with pytest.raises(DataError, match=r"data\.root: no such folder: .*nowhere"):
        read(str(table), root=str(tmp_path / "nowhere"))
