"""The demo's conversations, the embedded model, and what the two are said to be."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasttune_chat
from fasttune.cli import main
from fasttune.docstrings import Docstring
from fasttune.task import Source
from fasttune.testing import check_demo_model
from fasttune_chat import chat
from fasttune_chat.demo.signatures import conversations

MODEL = Path(fasttune_chat.__file__).parent / "demo" / "model"


def test_conversations_are_of_functions_that_are_summed_up():
    found = list(
        conversations(
            [
                *(Docstring(f"Return the number {i} of some.", f"def f{i}(x)") for i in range(4)),
                Docstring("Return something of this class.", ""),
                Docstring("Too little.", "def g(x)"),
                Docstring("Return something by many arguments.", f"def h({'x, ' * 80}y)"),
            ]
        )
    )
    assert [len(row["messages"]) for row in found] == [6, 2]
    assert found[1]["messages"] == [
        {"role": "user", "content": "def f3(x)"},
        {"role": "assistant", "content": "Return the number 3 of some."},
    ]


def test_the_demo_runs_by_every_strategy(monkeypatch, tmp_path):
    monkeypatch.setattr(chat, "DEMO_TRAIN", 24)
    monkeypatch.setattr(chat, "DEMO_VALID", 6)
    short = {name: {**train, "epochs": 1} for name, train in chat.DEMO_SETTINGS.items()}
    monkeypatch.setattr(chat, "DEMO_SETTINGS", short)
    result = CliRunner().invoke(main, ["demo", "text-generation", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    reached = {line[:18].strip(): line.split()[-2] for line in result.output.splitlines()[4:8]}
    assert list(reached) == ["from scratch", "head", "lora", "full"]
    # Of a model that knows nothing, the perplexity is about the number of its tokens, 5120.
    assert float(reached["lora"]) < 1000 < float(reached["from scratch"])


def test_the_model_is_small_and_says_how_it_was_made():
    check_demo_model(MODEL, "pretrain_decoder.py")
    assert json.loads((MODEL / "config.json").read_text())["model_type"] == "llama"


def test_the_model_knows_more_than_noise():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer('def read(path):\n"""Read the contents of a file.', return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 5.0, "chance is 8.5"


def test_the_template_needs_no_new_token():
    bundle = chat.Chat().build(Source(MODEL), [])
    assert not any("new tokens" in note for note in bundle.notes)
    assert "chatml" in bundle.notes[0]
