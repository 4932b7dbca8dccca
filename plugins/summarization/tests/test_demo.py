"""The demo's pairs, the embedded model, and what the two are said to be."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import fasttune_summarization
from fasttune.cli import main
from fasttune.docstrings import Docstring
from fasttune.task import Source
from fasttune.testing import check_demo_model
from fasttune_summarization import tasks
from fasttune_summarization.demo.docstrings import first_sentence, pairs
from fasttune_summarization.tasks import Summarization

MODEL = Path(fasttune_summarization.__file__).parent / "demo" / "model"
BODY = "The numbers are compared one by one, from the first to the last, and the largest one so far is kept. " * 20


def test_pairs_have_a_summary_in_a_line_and_a_body():
    texts = (
        f"Return the largest number.\n\n{BODY}",
        f"Too little.\n\n{BODY}",
        "Return the number\nof it.\n\nNone.",
    )
    found = list(pairs([Docstring(text, "") for text in texts]))
    assert [pair["summary"] for pair in found] == ["Return the largest number."]
    document = found[0]["document"]
    assert len(document) <= 800
    assert BODY.startswith(document + " ")
    assert first_sentence("One thing. Another thing.") == "One thing."


def test_the_demo_runs_by_every_strategy(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "DEMO_TRAIN", 24)
    monkeypatch.setattr(tasks, "DEMO_VALID", 6)
    short = {name: {**train, "epochs": 1} for name, train in tasks.DEMO_SETTINGS.items()}
    monkeypatch.setattr(tasks, "DEMO_SETTINGS", short)
    result = CliRunner().invoke(main, ["demo", "summarization", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    shown = [line.rsplit(None, 2)[0].strip() for line in result.output.splitlines() if " 0." in line]
    assert shown[1:] == ["from scratch", "head", "lora", "full"]
    assert "first sentence" in result.output
    assert tasks.Text2Text.demo() is None


def test_the_model_is_small_and_says_how_it_was_made():
    check_demo_model(MODEL, "pretrain_seq2seq.py")
    assert json.loads((MODEL / "config.json").read_text())["model_type"] == "t5"


def test_the_model_knows_more_than_noise():
    """Of a sentence that is left out, it thinks the true words much likelier than chance: 1 in 5120."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    inputs = tokenizer("<extra_id_0> Args: path (str): the path. Returns: a list of str.", return_tensors="pt")
    labels = tokenizer("Return a list of the files in the path.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert float(model(**inputs, labels=labels).loss) < 5.0, "chance is 8.5"


def test_its_prefix_asks_for_the_sentence_before_the_text():
    bundle = Summarization().build(Source(MODEL), [])
    assert bundle.notes[-1].startswith("prefix '<extra_id_0> '; reads at most 512 tokens")
    sample = Summarization().encode({"document": "Reads a file.", "summary": "reads"}, bundle, True)
    assert sample.tensors["input_ids"][0] == bundle.processor.convert_tokens_to_ids("<extra_id_0>")
