"""The demo's docstrings, the embedded model, and what the two are said to be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fasttune.task import Source
from fasttune_summarization import tasks
from fasttune_summarization.demo import docstrings
from fasttune_summarization.tasks import Summarization

MODEL = Path(docstrings.__file__).parent / "model"
embedded = pytest.mark.skipif(not MODEL.is_dir(), reason="no model is embedded yet")

SOURCE = '''"""A module whose documentation has one paragraph only, and is no pair therefore."""

def good():
    """Return the largest of some numbers.

    The numbers are compared one by one, from the first to the last of them, and the largest one
    that was seen so far is kept until there is none left.
    """

class Short:
    """Says too little about itself.

    Short.
    """

async def asynchronous():
    """Args:

    first, second, third: all of them are described at some length here, so that this body is long enough.
    """
'''


def test_pairs_are_read_from_functions_classes_and_modules(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = [pair for text in docstrings.docstrings(path) if (pair := docstrings.pair(text))]
    assert [pair["summary"] for pair in found] == ["Return the largest of some numbers."]
    assert found[0]["document"].startswith("The numbers are compared one by one")
    assert docstrings.first_sentence("One thing. Another thing.") == "One thing."
    path.write_text("print 'Python 2'")
    assert list(docstrings.docstrings(path)) == []


def test_tests_and_foreign_packages_are_left_out(tmp_path):
    for name in ("a.py", "sub/b.py", "tests/c.py", "_vendor/d.py", "sub/__pycache__/e.py", "site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [path.name for path in docstrings.files(tmp_path)] == ["a.py", "b.py"]


def test_the_sides_are_apart_by_the_summary_alone():
    train, valid = docstrings.split(60, 20, seed=3)
    assert (train, valid) == docstrings.split(60, 20, seed=3)
    assert (len(train), len(valid)) == (60, 20)
    assert not any(docstrings.is_held_out(row["summary"]) for row in train)
    assert all(docstrings.is_held_out(f"  {row['summary'].upper()} ") for row in valid)
    everything = [row["summary"].lower() for row in train + valid]
    assert len(set(everything)) == len(everything)


def test_too_few_docstrings_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "roots", lambda: {"mine": tmp_path})
    with pytest.raises(RuntimeError, match="5 docstrings are needed; the installed packages have 0"):
        docstrings.split(5, 1)


def test_reading_docstrings_imports_none_of_the_packages():
    code = (
        "import sys; from fasttune_summarization.demo import docstrings; docstrings.split(5, 2);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas', 'sympy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@embedded
def test_the_demo_compares_pretraining_with_none(monkeypatch):
    rows = [{"document": "Read a file. Then close it.", "summary": "Read a file."}]
    monkeypatch.setattr(docstrings, "split", lambda *sizes: (rows * sizes[0], rows))
    demo = Summarization.demo()
    assert demo.baselines == {"first sentence": 1.0}
    assert [name for name, _ in demo.variants] == ["from scratch", "head", "lora", "full"]
    settings = dict(demo.variants)
    assert [settings[name]["strategy"]["kind"] for name in settings] == ["full", "head", "lora", "full"]
    assert [name for name in settings if settings[name].get("weights") == "random"] == ["from scratch"]
    assert Path(demo.model) == MODEL
    assert len(demo.train) == tasks.DEMO_TRAIN
    assert tasks.Text2Text.demo() is None


@embedded
def test_the_model_is_small_and_says_how_it_was_made():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000
    assert {tensor.dtype for tensor in load_file(MODEL / "model.safetensors").values()} == {torch.bfloat16}
    assert "pretrain_seq2seq.py" in (MODEL / "README.md").read_text(encoding="utf-8")
    assert json.loads((MODEL / "config.json").read_text())["model_type"] == "t5"


@embedded
def test_the_model_knows_more_than_noise():
    """Of a sentence that is left out, it thinks the true words much likelier than chance: 1 in 5120."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    inputs = tokenizer("<extra_id_0> Args: path (str): the path. Returns: a list of str.", return_tensors="pt")
    labels = tokenizer("Return a list of the files in the path.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert float(model(**inputs, labels=labels).loss) < 5.0, "chance is 8.5"


@embedded
def test_its_prefix_asks_for_the_sentence_before_the_text():
    bundle = Summarization().build(Source(MODEL), [])
    assert bundle.notes[-1].startswith("prefix '<extra_id_0> '; reads at most 512 tokens")
    sample = Summarization().encode({"document": "Reads a file.", "summary": "reads"}, bundle, True)
    assert sample.tensors["input_ids"][0] == bundle.processor.convert_tokens_to_ids("<extra_id_0>")


def test_without_the_model_there_is_no_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "__file__", str(tmp_path / "docstrings.py"))
    assert Summarization.demo() is None
