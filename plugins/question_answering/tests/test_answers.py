"""Every way to write answers down gives the same rows; every wrong one says what is wrong."""

import json

import numpy as np
import pytest

from fasttune.errors import DataError
from fasttune_question_answering.answers import Answer, gold
from fasttune_question_answering.layouts import rows_of

CONTEXT = "The Elbe flows to the sea. The sea is cold."
ELBE, SEA = Answer("Elbe", 4), Answer("The sea", 27)


def read(answers, **more):
    return gold({"question": "what?", "context": CONTEXT, "answers": answers, **more})


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Elbe", "The sea"], "answer_start": [4, 27]},
        {"text": ["Elbe", "The sea"]},
        {"text": np.array(["Elbe", "The sea"], dtype=object), "answer_start": np.array([4, 27])},
        [{"text": "Elbe", "answer_start": 4}, {"text": "The sea", "answer_start": 27.0}],
        [{"text": "Elbe"}, {"text": "The sea", "answer_start": None}],
        ["Elbe", "The sea"],
        json.dumps({"text": ["Elbe", "The sea"], "answer_start": [4, 27]}),
        json.dumps([{"text": "Elbe", "answer_start": 4}, {"text": "The sea", "answer_start": "27"}]),
        "{'text': ['Elbe', 'The sea'], 'answer_start': [4, 27]}",
    ],
)
def test_layouts_of_answers(answers):
    assert read(answers) == [ELBE, SEA]


@pytest.mark.parametrize("start", [4, "4", 4.0, "4.0", None, "", [4], "[4]", np.int64(4)])
def test_one_answer_and_its_offset(start):
    assert read("Elbe", answer_start=start) == [ELBE]
    assert read({"text": "Elbe"}, answer_start=start) == [ELBE]


@pytest.mark.parametrize("answers", [None, "", "  ", [], {"text": [], "answer_start": []}, {"text": None}, "[]"])
@pytest.mark.parametrize("impossible", [None, "", True, "True", 1])
def test_no_answer(answers, impossible):
    assert read(answers, is_impossible=impossible) == []


def test_an_answer_may_look_like_a_list():
    row = {"context": "x = [1, 2] or {}", "answers": "[1, 2]"}
    assert gold(row) == [Answer("[1, 2]", 4)]
    assert gold({**row, "answers": "{}"}) == [Answer("{}", 14)]


@pytest.mark.parametrize(
    ("answers", "more", "column", "why"),
    [
        ("Elbe", {"answer_start": 5}, "answers", "expected 'Elbe' at answer_start 5, found 'lbe '; it is at 4"),
        (
            "Oder",
            {"answer_start": 5},
            "answers",
            "expected 'Oder' at answer_start 5, .* it is nowhere",
        ),
        ("Elbe", {"answer_start": 99}, "answers", "at answer_start 99, the context ends at 43; it is at 4"),
        ("The sea", {"answer_start": 28}, "answers", "found 'he sea '; it is at 27"),
        ("Oder", {}, "answers", "'Oder' does not occur in the context"),
        ("sea", {}, "answers", "'sea' occurs more than once in the context; answer_start must say which"),
        ("Elbe", {"answer_start": -4}, "answers", "answer_start: expected the place .* found -4"),
        ("Elbe", {"answer_start": "four"}, "answers", "answer_start: expected the place .* found 'four'"),
        ("Elbe", {"answer_start": 4.5}, "answers", "found 4.5"),
        ("Elbe", {"answer_start": float("nan")}, "answers", "found nan"),
        ("Elbe", {"answer_start": True}, "answers", "found True"),
        ("Elbe", {"answer_start": "[4"}, "answers", r"found '\[4'"),
        (["Elbe"], {"answer_start": [4, 5]}, "answers", "found 1 texts and 2 answer_start"),
        ({"text": ["Elbe", "sea"], "answer_start": [4]}, {}, "answers", "found 2 texts and 1 answer_start"),
        ({"answer_start": [4]}, {}, "answers", "expected the keys text and answer_start, found answer_start"),
        ([{"answer": "Elbe"}], {}, "answers", "expected a key text in every answer, found answer"),
        ([""], {}, "answers", "an answer is blank"),
        ([None], {}, "answers", "expected text, found NoneType"),
        (4, {}, "answers", "expected answers, found int 4"),
        (float("nan"), {}, "answers", "expected answers, found float nan"),
        ("Elbe", {"is_impossible": True}, "is_impossible", "is true, but there is an answer: 'Elbe'"),
        ([], {"is_impossible": False}, "answers", "there is no answer, but is_impossible is false"),
        ("Elbe", {"is_impossible": "maybe"}, "is_impossible", "expected true or false, found 'maybe'"),
    ],
)
def test_faults(answers, more, column, why):
    with pytest.raises(DataError, match=why) as caught:
        read(answers, **more)
    assert caught.value.column == column
    with pytest.raises(DataError, match=r"\(question id 'q7'\)$"):
        read(answers, **more, id="q7")


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Elbe",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "1",
                            "question": "Which river?",
                            "answers": [{"text": "Elbe", "answer_start": 4}],
                            "is_impossible": False,
                        },
                        {
                            "id": "2",
                            "question": "Which lake?",
                            "answers": [],
                            "plausible_answers": [{"text": "Elbe", "answer_start": 4}],
                            "is_impossible": True,
                        },
                    ],
                },
                {"context": "nothing is asked of this", "qas": []},
            ],
        },
        {"paragraphs": [{"context": "It is cold.", "qas": [{"question": "How is it?"}]}]},
    ],
}


def test_squad_becomes_a_row_a_question():
    rows = rows_of(SQUAD)
    assert [row["id"] for row in rows] == ["1", "2", None]
    assert [gold(row) for row in rows] == [[ELBE], [], []]
    assert [row.get("is_impossible") for row in rows] == [False, True, None]
    assert rows[2] == {"id": None, "question": "How is it?", "context": "It is cold.", "answers": []}


def test_other_documents():
    flat = [{"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}]
    assert rows_of({"version": "0.1", "data": flat}) == flat
    assert rows_of({"question": "q", "context": "c"}) is None
    assert rows_of({"data": "text"}) is None
    assert rows_of({"data": []}) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([3], r"^data\[0\]: expected an object, found int"),
        ([{"paragraphs": {}}], r"^data\[0\]: expected a list 'paragraphs'; found 'paragraphs'"),
        (
            [{"paragraphs": []}, {"paragraphs": [[]]}],
            r"^data\[1\]\.paragraphs\[0\]: expected an object",
        ),
        ([{"paragraphs": [{"qas": []}]}], r"^data\[0\]\.paragraphs\[0\]: has no 'context'; found 'qas'"),
        (
            [{"paragraphs": [{"context": "c"}]}],
            r"^data\[0\]\.paragraphs\[0\]: expected a list 'qas'",
        ),
        ([{"paragraphs": [{"context": "c", "qas": ["q"]}]}], r"\.qas\[0\]: expected an object, found str"),
    ],
)
def test_broken_documents_name_the_place(data, why):
    with pytest.raises(DataError, match=why):
        rows_of({"data": data})
