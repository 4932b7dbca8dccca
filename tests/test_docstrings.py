"""Docstrings of what is installed: what is read, and that the two sides of a split stay apart."""

import subprocess
import sys

import pytest

from fasttune import docstrings
from fasttune.docstrings import Docstring

SOURCE = '''"""A module
of its own.

More."""

def good(first: int, *rest, last=None) -> "int":
    """Return the largest of some numbers.

    They are compared one by one.
    """

class Plain:
    """Says too little."""

async def asynchronous(x):
    """Wait for all that is under way."""
'''


def test_docstrings_of_modules_classes_and_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = {docstring.summary: docstring for docstring in docstrings.docstrings(path)}
    assert set(found) == {
        "A module of its own.",
        "Return the largest of some numbers.",
        "Says too little.",
        "Wait for all that is under way.",
    }
    good = found["Return the largest of some numbers."]
    assert good.signature == "def good(first: int, *rest, last=None) -> 'int'"
    assert good.body == "They are compared one by one."
    assert good.text == "Return the largest of some numbers.\n\nThey are compared one by one."
    assert found["Wait for all that is under way."].signature == "def asynchronous(x)"
    assert found["A module of its own."].signature == found["Says too little."].signature == ""
    path.write_text("print 'Python 2'")
    assert list(docstrings.docstrings(path)) == []


@pytest.mark.parametrize(
    ("summary", "is_one"),
    [
        ("Return the largest of some numbers.", True),
        ("Says too little.", False),
        ("Its parameters are the following ones:", False),
        ("Title of it ---- and no sentence.", False),
        ("word " * 21, False),
    ],
)
def test_what_counts_as_a_summary_in_a_line(summary, is_one):
    assert Docstring(f"{summary}\n\nA body.", "").is_summed_up is is_one


def test_tests_and_foreign_packages_are_left_out(tmp_path):
    for name in ("a.py", "sub/b.py", "tests/c.py", "_vendor/d.py", "sub/__pycache__/e.py", "site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in docstrings.files(tmp_path)] == ["a.py", "b.py"]


def rows(found):
    return [{"text": docstring.summary} for docstring in found if docstring.is_summed_up]


def test_the_sides_are_apart_by_the_first_paragraph_alone():
    train, valid = docstrings.split(rows, 60, 20, seed=3)
    assert (train, valid) == docstrings.split(rows, 60, 20, seed=3)
    assert (len(train), len(valid)) == (60, 20)
    assert not any(docstrings.is_held_out(row["text"]) for row in train)
    assert all(docstrings.is_held_out(f"  {row['text'].upper()} ") for row in valid)
    everything = [row["text"].lower() for row in train + valid]
    assert len(set(everything)) == len(everything)


def test_equal_summaries_and_equal_bodies_appear_once(tmp_path, monkeypatch):
    body = "A body of some length, which is the same in two of these docstrings, and longer than eighty letters."
    texts = [f"Return the number {i} of some.\n\nBody {i}." for i in range(40)]
    texts += [texts[0], f"Another one of the same body.\n\n{body}", f"And yet one of the same body.\n\n{body}"]
    for i, text in enumerate(texts):  # in files of their own: at most four rows come from one
        (tmp_path / f"{i}.py").write_text(f"def f():\n    {text!r}\n")
    monkeypatch.setattr(docstrings, "roots", lambda: {"mine": tmp_path})
    held_out = sum(docstrings.is_held_out(text.partition("\n\n")[0]) for text in set(texts[:40]))
    train, valid = docstrings.split(rows, 41 - held_out, held_out)
    found = [row["text"] for row in train + valid]
    assert len(set(found)) == len(found) == 41
    assert sum("of the same body" in text for text in found) == 1
    with pytest.raises(RuntimeError, match=f"{42 - held_out} docstrings are needed; the installed packages have"):
        docstrings.split(rows, 42 - held_out, held_out)


def test_too_few_docstrings_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "roots", lambda: {"mine": tmp_path})
    with pytest.raises(RuntimeError, match="5 docstrings are needed; the installed packages have 0"):
        docstrings.split(rows, 5, 1)


def test_reading_docstrings_imports_none_of_the_packages():
    code = (
        "import sys; from fasttune import docstrings;"
        "docstrings.split(lambda found: [{'text': d.text} for d in found], 5, 2);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas', 'sympy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
