"""The embedded encoder and the demo's docstrings, as they are installed."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fasttune.task import Source
from fasttune.testing import check_demo_model
from fasttune_classification.demo import docstrings
from fasttune_classification.text import TextClassification

ENCODER = Path(docstrings.__file__).parent / "encoder"


def test_the_encoder_is_small_and_says_how_it_was_made():
    check_demo_model(ENCODER, "pretrain_encoder.py")


def test_the_encoder_knows_more_than_noise():
    """Of a masked word in plain documentation it thinks much likelier than chance: 1 in 7168."""
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    model = AutoModelForMaskedLM.from_pretrained(ENCODER, dtype=torch.float32).eval()
    likely = []
    for before, word, after in (
        ("returns a", "list", "of strings"),
        ("raises an error if the file does not", "exist", ""),
        ("the default value", "is", "none"),
        ("if true, return a", "copy", "of the array"),
    ):
        answer = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert len(answer) == 1
        encoded = tokenizer(f"{before}{tokenizer.mask_token} {after}", return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        place = encoded["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        likely.append(float(logits[place].softmax(-1)[answer[0]]))
    assert sum(likely) / len(likely) > 0.05


def test_its_features_are_pretrained_and_only_the_classifier_is_new():
    bundle = TextClassification().build(Source(ENCODER), ["a", "b", "c"])
    assert bundle.notes == ("new head: 3 classes",)
    stored = load_file(ENCODER / "model.safetensors")
    model = dict(bundle.model.named_parameters())
    new = {name for name in model if name not in stored}
    assert new == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(model[name], stored[name]) for name in model.keys() - new)


def test_docstrings_are_balanced_masked_and_of_different_files():
    train, valid = docstrings.split(12, 5, seed=3)
    assert (train, valid) == docstrings.split(12, 5, seed=3)
    labels = {row["label"] for row in train}
    assert len(labels) >= 5
    assert all(sum(row["label"] == label for row in train) == 12 for label in labels)
    assert all(sum(row["label"] == label for row in valid) == 5 for label in labels)
    texts = [row["text"].lower() for row in train + valid]
    assert len(set(texts)) == len(texts)
    assert not any(label in text for label in labels - {"stdlib"} for text in texts)


def test_reading_docstrings_imports_none_of_the_libraries():
    code = (
        "import sys; from fasttune_classification.demo import docstrings; docstrings.split(3, 2);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas', 'sympy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
