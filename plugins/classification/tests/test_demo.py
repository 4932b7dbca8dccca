"""The demo's rows and variants; the embedded encoder is tested where it is made."""

from pathlib import Path

import pytest

import fasttune_classification.text as text


@pytest.fixture
def demo(monkeypatch):
    from fasttune_classification.demo import docstrings

    def split(per_label_train, per_label_valid, seed):
        assert (per_label_train, per_label_valid) == (text.DEMO_TRAIN_PER_LABEL, text.DEMO_VALID_PER_LABEL)
        return [{"text": "reads a file", "label": "b"}], [{"text": "x", "label": label} for label in "aabac"]

    monkeypatch.setattr(docstrings, "split", split)
    return text.TextClassification.demo()


def test_demo_compares_pretraining_with_none(demo):
    assert demo.baselines == {"majority class": 0.6}
    assert [name for name, _ in demo.variants] == ["from scratch", "head", "lora", "full"]
    settings = dict(demo.variants)
    assert settings["from scratch"]["weights"] == "random"
    assert [s["strategy"]["kind"] for s in settings.values()] == ["full", "head", "lora", "full"]
    assert all("weights" not in settings[name] for name in ("head", "lora", "full"))
    assert Path(demo.model).parts[-2:] == ("demo", "encoder")
    assert {key for row in (*demo.train, *demo.valid) for key in row} == {"text", "label"}
