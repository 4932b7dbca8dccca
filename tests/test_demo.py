"""`fasttune demo`, on few rows and steps."""

from click.testing import CliRunner

import fasttune_classification.text as text
from fasttune.cli import main


def test_the_demo_shows_every_variant_beside_the_majority_class(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "DEMO_TRAIN_PER_LABEL", 4)
    monkeypatch.setattr(text, "DEMO_VALID_PER_LABEL", 3)
    monkeypatch.setattr(
        text, "DEMO_TRAIN", {name: {**train, "epochs": 1} for name, train in text.DEMO_TRAIN.items()}
    )
    result = CliRunner().invoke(main, ["demo", "text-classification", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    shown = [line.rsplit(None, 2)[0].strip() for line in result.output.splitlines() if " 0." in line]
    assert shown[1:] == ["from scratch", "head", "lora", "full"]
    assert "majority class" in result.output
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"from-scratch", "head", "lora", "full"}


def test_a_demo_that_cannot_be_made_says_why(monkeypatch):
    def poor(*_):
        raise RuntimeError("only 2 installed libraries have enough docstrings")

    from fasttune_classification.demo import docstrings

    monkeypatch.setattr(docstrings, "split", poor)
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 2
    assert "only 2 installed libraries" in result.output


def test_a_task_without_a_demo_says_so():
    result = CliRunner().invoke(main, ["demo", "image-classification"])
    assert result.exit_code == 2
    assert "carries no demo" in result.output
