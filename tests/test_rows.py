"""Columns found by role and alias, and every value checked as its kind wants it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttune.data import Encoded, check, sort_classes
from fasttune.errors import DataError
from fasttune.media import Limits
from fasttune.readers import MixedRows, Table, read
from fasttune.rows import Rows, map_columns, open_rows
from fasttune.task import Bundle, Column, Sample, Task

TEXT = Column("text", "text", ("sentence", "body"))
PAIR = Column("text_pair", "text", ("sentence2",), required=False)
LABEL = Column("label", "label", ("class", "target"))
LABELS = Column("labels", "labels", ("tags",))
NUMBER = Column("score", "number", ("value",))


def table_of(*rows: dict[str, Any]) -> Table:
    return Table("rows", MixedRows(rows))


def rows_of(columns: tuple[Column, ...], *rows: dict[str, Any], **named: str) -> Rows:
    return open_rows(table_of(*rows), columns, named, Limits())


def value_of(column: Column, value: Any) -> Any:
    return rows_of((column,), {column.role: value}).read(0)[column.role]


def fault_of(column: Column, value: Any) -> str:
    with pytest.raises(DataError) as refused:
        value_of(column, value)
    assert refused.value.column == column.role
    return refused.value.why


@pytest.mark.parametrize(
    ("names", "named", "expected"),
    [
        (["text", "label"], {}, {"text": "text", "label": "label"}),
        (["sentence", "class", "id"], {}, {"text": "sentence", "label": "class"}),
        (["Text", "LABEL"], {}, {"text": "Text", "label": "LABEL"}),
        (["body", "sentence", "label"], {}, {"text": "sentence", "label": "label"}),
        (["text", "body", "label"], {"text": "body"}, {"text": "body", "label": "label"}),
        (["label", "class"], {"text": "label"}, {"text": "label", "label": "class"}),
        (["text", "sentence2", "label"], {}, {"text": "text", "text_pair": "sentence2", "label": "label"}),
        (["text", "Text", "label"], {}, {"text": "text", "label": "label"}),
        (["Text", "text", "label"], {}, {"text": "text", "label": "label"}),
    ],
)
def test_columns_are_found(names: list[str], named: dict[str, str], expected: dict[str, str]) -> None:
    table = table_of(dict.fromkeys(names, "x"))
    assert map_columns(table, (TEXT, PAIR, LABEL), named) == expected


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_media_are_found_by_the_names_that_they_usually_have(kind: Any) -> None:
    """Of every task, after its own aliases."""
    own = Column(kind, kind, ("scan",))
    for name in ("file", "file_name", "FileName", "filepath", "path", f"{kind}_path", f"{kind}_file"):
        assert map_columns(table_of({"id": 1, name: "x"}), (Column(kind, kind),), {}) == {kind: name}
        assert map_columns(table_of({name: "x", "scan": "y"}), (own,), {}) == {kind: "scan"}
        with pytest.raises(DataError, match="no column for 'text'"):
            map_columns(table_of({name: "x"}), (TEXT,), {})
    assert own.names[:2] == (kind, "scan")
    assert len(set(own.names)) == len(own.names)


def test_a_column_serves_one_role_only() -> None:
    table = table_of({"text": "x", "other": "y"})
    with pytest.raises(DataError, match="no column for 'label'"):
        map_columns(table, (TEXT, LABEL), {"text": "other"} | {})
    with pytest.raises(DataError, match="no column for 'label'"):
        map_columns(table_of({"target": "x"}), (TEXT, LABEL), {"text": "target"})


@pytest.mark.parametrize(
    ("value", "name"), [("pos", "pos"), (" pos ", "pos"), (3, "3"), (-1, "-1"), (True, "true"), (False, "false")]
)
def test_class_names(value: Any, name: str) -> None:
    assert value_of(LABEL, value) == name


@pytest.mark.parametrize(
    ("value", "why"),
    [(None, "found none"), ("", "found none"), ("  ", "found none"), (1.0, "the float 1.0"), ([1], "list [1]")],
)
def test_values_that_are_no_class(value: Any, why: str) -> None:
    assert why in fault_of(LABEL, value)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["b", "a"], ["a", "b"]),
        (["a", "a", " a "], ["a"]),
        ([], []),
        ([1, 2], ["1", "2"]),
        ("a|b", ["a", "b"]),
        ("a; b", ["a", "b"]),
        ("a, b", ["a", "b"]),
        ("new york|old, town", ["new york", "old, town"]),
        ('["a, b", "c"]', ["a, b", "c"]),
        ("one", ["one"]),
        ("", []),
    ],
)
def test_lists_of_classes(value: Any, names: list[str]) -> None:
    assert value_of(LABELS, value) == names


@pytest.mark.parametrize("value", [None, 3, [None], [1.5], '["a"', {"a": 1}])
def test_values_that_are_no_list_of_classes(value: Any) -> None:
    assert fault_of(LABELS, value)


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), (2.5, 2.5), ("2.5", 2.5), (" 3 ", 3.0), ("1e-3", 1e-3), (-0.0, 0.0)]
)
def test_numbers(value: Any, number: float) -> None:
    assert value_of(NUMBER, value) == number


@pytest.mark.parametrize("value", [None, "", "many", "1,5", "1_5", True, float("nan"), "inf", [1], {}])
def test_values_that_are_no_number(value: Any) -> None:
    assert "expected a" in fault_of(NUMBER, value)


def test_an_optional_value_may_be_missing_but_not_blank() -> None:
    rows = rows_of((TEXT, PAIR), {"text": "a", "text_pair": None}, {"text": "a", "text_pair": " "})
    assert rows.read(0) == {"text": "a"}
    with pytest.raises(DataError, match="text_pair: expected text, found only blanks"):
        rows.read(1)


def test_any_json_value_passes_as_it_stands() -> None:
    value = {"a": [1, None, "x"]}
    assert value_of(Column("extra", "json"), value) == value


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        (["neg", "Pos"], ["Pos", "neg"]),
        (["1", "²"], ["1", "²"]),
        (["3", "--5"], ["--5", "3"]),
        (["2", "-"], ["-", "2"]),
    ],
)
def test_order_of_classes(names: list[str], order: list[str]) -> None:
    assert sort_classes(names) == order


def test_csv_labels_written_as_whole_numbers_and_fractions(tmp_path: Path) -> None:
    """A column of numbers is one of classes only if all are whole: 3.0 beside 3.5 is a rating, not a class."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,1\nb,2\n")
    assert check(open_rows(read(str(path)), (TEXT, LABEL), {}, Limits())).classes == {"1": 1, "2": 1}
    path.write_text("text,label\na,1.0\nb,2\n\n")
    bad = check(open_rows(read(str(path)), (TEXT, LABEL), {}, Limits())).bad
    assert [row.row for row in bad] == [1, 2]
    path.write_text("text,label\na,1_0\nb,1_1\n")  # Python reads 1_0 as ten; people don't
    assert check(open_rows(read(str(path)), (TEXT, LABEL), {}, Limits())).classes == {"1_0": 1, "1_1": 1}
    path.write_text("text,label\na,v1.0\nb,2.5\nc,2\n")
    found = check(open_rows(read(str(path)), (TEXT, LABEL), {}, Limits()))
    assert found.classes == {"v1.0": 1, "2.5": 1, "2": 1}


def test_class_names_of_a_saved_dataset(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    classes = ClassLabel(names=["no", "yes"])
    features = Features({"text": Value("string"), "label": classes, "tags": List(classes)})
    rows = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": 0, "tags": []}]
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    opened = open_rows(read(str(tmp_path / "saved")), (TEXT, LABEL, LABELS), {}, Limits())
    assert [opened.read(i)["label"] for i in (0, 1)] == ["yes", "no"]
    assert [opened.read(i)["labels"] for i in (0, 1)] == [["no", "yes"], []]


@pytest.mark.parametrize("name", ["saved", "rows.parquet"])
def test_class_names_inside_a_json_column(tmp_path: Path, name: str) -> None:
    """Objects of an image, as a mapping of lists, as hub sets hold them, and as a list of mappings."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    kinds = ClassLabel(names=["cat", "dog"])
    features = Features(
        {
            "text": Value("string"),
            "objects": {"bbox": List(List(Value("float32"))), "category": List(kinds)},
            "parts": List({"id": Value("int64"), "kind": kinds}),
        }
    )
    rows = [
        {
            "text": "a",
            "objects": {"bbox": [[1.0, 2.0, 3.0, 4.0]] * 2, "category": [1, None]},
            "parts": [{"id": 1, "kind": 0}],
        },
        {"text": "b", "objects": {"bbox": [], "category": []}, "parts": None},
    ]
    path = str(tmp_path / name)
    dataset = Dataset.from_list(rows, features=features)
    dataset.save_to_disk(path) if name == "saved" else dataset.to_parquet(path)
    columns = (TEXT, Column("objects", "json"), Column("parts", "json", required=False))
    opened = open_rows(read(path), columns, {}, Limits())
    assert opened.read(0) == {
        "text": "a",
        "objects": {"bbox": [[1.0, 2.0, 3.0, 4.0]] * 2, "category": ["dog", None]},
        "parts": [{"id": 1, "kind": "cat"}],
    }
    assert opened.read(1) == {"text": "b", "objects": {"bbox": [], "category": []}}
    named = open_rows(read(path), columns[1:2], {"objects": "objects.category"}, Limits())
    assert named.read(0) == {"objects": ["dog", None]}


def test_class_numbers_outside_their_names_inside_a_json_column(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, Features, List

    table = pa.table({"objects": [{"category": [0, 1]}, {"category": [2]}]})
    dataset = Dataset(table).cast(Features({"objects": {"category": List(ClassLabel(names=["cat", "dog"]))}}))
    dataset.save_to_disk(str(tmp_path / "saved"))
    found = check(open_rows(read(str(tmp_path / "saved")), (Column("objects", "json"),), {}, Limits()))
    assert [(bad.row, bad.column) for bad in found.bad] == [(2, "objects")]
    assert "from 0 to 1, found 2" in found.bad[0].why


def test_a_fault_that_the_reader_found_is_raised_where_its_column_is_read() -> None:
    rows = (
        {"text": "a", "label": "x"},
        {"text": "b", "label": DataError(None, "line 3: expected a class")},
        {"text": DataError("label", "a label of no page"), "label": DataError("label", "a label of no page")},
    )
    found = check(rows_of((TEXT, LABEL), *rows))
    assert found.good.tolist() == [0]
    assert [(bad.row, bad.column, bad.why) for bad in found.bad] == [
        (2, "label", "line 3: expected a class"),
        (3, "label", "a label of no page"),
    ]
    assert check(rows_of((TEXT,), *rows)).good.tolist() == [0, 1]
    optional = Column("label", "label", required=False)
    assert len(check(rows_of((TEXT, optional), *rows)).bad) == 2


def test_an_image_that_the_reader_found_no_file_for() -> None:
    column = Column("image", "image")
    rows = rows_of((column,), {"image": DataError(None, "a.txt: no image bears this name")})
    assert [bad.why for bad in check(rows).bad] == ["a.txt: no image bears this name"]


def test_a_dotted_name_leads_into_a_column_of_mappings(tmp_path: Path) -> None:
    source, target = Column("source", "text"), Column("target", "text", target=True)
    pairs = [{"translation": {"en": "a tree", "de": "ein Baum"}}, {"translation": {"en": "a house", "de": None}}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    names = {"source": "translation.en", "target": "translation.de"}
    for table in (read(str(file)), table_of(*pairs)):
        rows = open_rows(table, (source, target), names, Limits())
        assert rows.read(0) == {"source": "a tree", "target": "ein Baum"}
        seen = check(rows)
        assert [(bad.row, bad.column) for bad in seen.bad] == [(2, "translation.de")]
        assert seen.keys[0] != seen.keys[1]
    with pytest.raises(DataError, match=r"no column 'translations\.en'.*Did you mean 'translation'"):
        map_columns(read(str(file)), (source,), {"source": "translations.en"})


def test_class_numbers_outside_their_names(tmp_path: Path) -> None:
    """-1 is what hub datasets write for a test split without labels."""
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset(pa.table({"text": ["a", "b"], "label": [1, -1]})).cast(features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    found = check(open_rows(read(str(tmp_path / "saved")), (TEXT, LABEL), {}, Limits()))
    assert [(bad.row, bad.column) for bad in found.bad] == [(2, "label")]
    assert "from 0 to 1, found -1" in found.bad[0].why


def test_a_subset_keeps_the_numbers_of_the_file() -> None:
    rows = rows_of((TEXT,), *({"text": word} for word in "abcdef")).take([4, 1])
    assert [rows.read(i)["text"] for i in range(2)] == ["e", "b"]
    assert [raw["text"] for raw in rows] == ["e", "b"]
    assert [rows.number(i) for i in range(2)] == [5, 2]
    assert rows.take([1]).number(0) == 2


def test_a_subset_of_a_mapped_table_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in "abcdef"))
    rows = open_rows(read(str(path)), (TEXT,), {}, Limits()).take([5, 0, 3])
    assert [raw["text"] for raw in rows] == ["f", "a", "d"]
    assert rows.read(2)["text"] == "d"


def test_bad_rows_bear_the_name_of_the_file_and_its_column() -> None:
    rows = rows_of((TEXT, LABEL), {"body": "a", "class": "x"}, {"body": "", "class": None})
    found = check(rows)
    assert [(bad.file, bad.row, bad.column) for bad in found.bad] == [("rows", 2, "body")]
    assert found.good.tolist() == [0]


def test_the_fingerprint_tells_data_apart_by_what_the_task_reads() -> None:
    one = {"text": "a", "label": "x", "other": 1}
    same = check(rows_of((TEXT, LABEL), one)).fingerprint
    assert check(rows_of((TEXT, LABEL), {**one, "other": 2})).fingerprint == same
    for change in ({"text": "b"}, {"label": "y"}, {"label": None}):
        assert check(rows_of((TEXT, LABEL), {**one, **change})).fingerprint != same


def test_rows_that_are_only_predicted_pass_the_tasks_to_predict() -> None:
    class Echo(Task):
        columns = (Column("text", "text"),)

        def to_predict(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"text": row["text"] + "?"}

        def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
            return Sample({"letters": np.frombuffer(row["text"].encode(), dtype=np.uint8)}, cost=1)

    rows = open_rows(Table("t", MixedRows([{"text": "ab"}])), Echo.columns, {}, Limits())
    bundle = Bundle(torch.nn.Linear(1, 1), None, (), (), ())
    for supervised, expected in ((True, b"ab"), (False, b"ab?")):
        encoded = Encoded(rows, Echo(), bundle, train=False, supervised=supervised).fill()
        assert encoded[0].tensors["letters"].tobytes() == expected


def test_rows_are_counted_by_what_the_task_names() -> None:
    rows = open_rows(
        Table("rows", MixedRows({"text": text} for text in ("a", "bb", "!", "cc"))),
        (Column("text", "text"),),
        {},
        Limits(),
    )

    def count(row: Any) -> list[str]:
        if row["text"] == "!":
            raise DataError("text", "expected a word")
        return ["long"] if len(row["text"]) > 1 else []

    seen = check(rows, count=count)
    assert seen.counted == {"long": 2}
    assert seen.names == [[], ["long"], [], ["long"]]
    assert seen.good.tolist() == [0, 1, 3]
    assert [(bad.row, bad.column, bad.why) for bad in seen.bad] == [(3, "text", "expected a word")]


class Boxes(Task):
    """Classes inside a JSON column, one of them to be refused."""

    columns = (Column("image", "image"), Column("objects", "json", target=True))

    def classes_of(self, row: Any) -> list[str]:
        if "!" in row["objects"]:
            raise DataError("objects", "expected a class")
        return [f"{name} of {row['image'][0]}" for name in row["objects"]]


def test_classes_that_no_label_column_holds(tmp_path: Path) -> None:
    """They are counted as often as they occur, with the image's size at hand; valid may name no others."""
    for name, size in (("wide", (30, 20)), ("high", (20, 30))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")

    def rows_of(*rows: tuple[str, list[str]]) -> Rows:
        table = Table("rows", MixedRows({"image": image, "objects": objects} for image, objects in rows), tmp_path)
        return open_rows(table, Boxes.columns, {}, Limits())

    task = Boxes()
    train = check(
        rows_of(("wide.png", ["a", "b", "a"]), ("high.png", []), ("wide.png", ["!"]), ("text.png", ["a"])),
        classes_of=task.classes_of,
    )
    assert train.classes == {"a of 30": 2, "b of 30": 1}
    assert train.labels[:2] == [["a of 30", "b of 30", "a of 30"], []]
    assert train.good.tolist() == [0, 1]
    assert [(bad.row, bad.column) for bad in train.bad] == [(3, "objects"), (4, "image")]
    valid = check(
        rows_of(("wide.png", ["b"]), ("high.png", ["b"])), set(train.classes), classes_of=task.classes_of
    )
    assert [(bad.row, bad.column) for bad in valid.bad] == [(2, "objects")]
    assert "'b of 20' is not among the 2 of train" in valid.bad[0].why
