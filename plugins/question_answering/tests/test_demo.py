"""The demo's questions, the embedded model, and what the two are said to be."""

import json
from pathlib import Path

from click.testing import CliRunner

import fasttune_question_answering
from fasttune.cli import main
from fasttune.docstrings import Docstring
from fasttune.testing import check_demo_model
from fasttune_question_answering import task
from fasttune_question_answering.demo.parameters import entries, first_type, questions

MODEL = Path(fasttune_question_answering.__file__).parent / "demo" / "model"
GOOGLE = """Open a file.

Args:
    path (`str`): where it is
    mode (:obj:`str`, *optional*, defaults to `"r"`):
        how it is opened
    size (int or None, optional): at most so many bytes
    sizes (dict[str, int]): its comma is inside of brackets, and the type is left out
    *others (optional): of no type
"""
NUMPY = """Sum things up.

Parameters
----------
values : array_like
    What is summed up.
axis : int, optional
    Along which axis (default: 0).
dtype : np.dtype, default=None
    Of the sum.
"""


def read(text):
    return [
        (entry.name, text[slice(*entry.type)], text[slice(*entry.default)] if entry.default else None)
        for entry in entries(text)
    ]


def test_parameters_are_read_in_both_styles():
    assert read(GOOGLE) == [("path", "str", None), ("mode", "str", "r"), ("size", "int or None", None)]
    assert read(NUMPY) == [("values", "array_like", None), ("axis", "int", None), ("dtype", "np.dtype", "None")]
    assert (first_type(GOOGLE), first_type("Nothing is told.")) == ("str", "")


def test_questions_have_their_answer_in_the_context():
    long = NUMPY + "filler " * 200
    found = list(questions([Docstring(text, "") for text in (GOOGLE, long, "Open a file.\n\npath : str\n")]))
    assert len(found) == 2, "one parameter is too little to choose from"
    for row in found:
        assert row["context"][row["answer_start"] :].startswith(row["answers"])
        assert len(row["context"]) <= 700
        kind, name = row["question"].removeprefix("What is the ").removesuffix("?").split(" of ")
        told = {entry[0]: {"type": entry[1], "default": entry[2]} for entry in read(GOOGLE) + read(NUMPY)}
        assert told[name][kind] == row["answers"]


def test_the_demo_runs_by_every_strategy(monkeypatch, tmp_path):
    monkeypatch.setattr(task, "DEMO_TRAIN", 24)
    monkeypatch.setattr(task, "DEMO_VALID", 6)
    short = {name: {**train, "epochs": 1} for name, train in task.DEMO_SETTINGS.items()}
    monkeypatch.setattr(task, "DEMO_SETTINGS", short)
    result = CliRunner().invoke(main, ["demo", "question-answering", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    shown = [line[:18].strip() for line in result.output.splitlines()[4:9]]
    assert shown == ["first type told", "from scratch", "head", "lora", "full"]


def test_the_model_is_small_and_says_how_it_was_made():
    check_demo_model(MODEL, "pretrain_spans.py")
    assert json.loads((MODEL / "config.json").read_text())["architectures"] == ["ModernBertForQuestionAnswering"]
