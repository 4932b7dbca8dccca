"""End to end: what a run learns, leaves behind, and gives to whoever opens it with other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttune
import fasttune.ops
from fasttune import config as configs
from fasttune.errors import ConfigError
from fasttune.report import Report

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full", "train": {"epochs": 16, "lr": 1e-3, "head_lr": 1e-3}},
    "head": {"strategy": "head", "train": {"epochs": 20, "lr": 5e-2}},
    "lora": {"strategy": "lora", "train": {"epochs": 12, "lr": 5e-3}},
}


@pytest.fixture(scope="module")
def finished(
    tiny_bert: Path, toy_files: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Report]]:
    """finished(kind) -> folder and report of a run with that strategy; made once."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Report] = {}

    def run(kind: str) -> tuple[Path, Report]:
        if kind not in done:
            settings = SETTINGS[kind]
            done[kind] = fasttune.finetune(
                task="text-classification",
                model=str(tiny_bert),
                data={"train": toy_files.train, "valid": toy_files.valid},
                strategy=settings["strategy"],
                train={"batch": 8, "precision": "fp32", **settings["train"]},
                output=str(folder / kind),
                quiet=True,
            )
        return folder / kind, done[kind]

    return run


@pytest.fixture
def texts(toy_rows: dict[str, list[dict[str, str]]]) -> list[str]:
    return [row["text"] for row in toy_rows["valid"]]


def read_lines(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and evaluations of metrics.jsonl."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "metrics" in r]


def pipeline_scores(folder: Path, texts: list[str]) -> list[dict[str, float]]:
    from transformers import pipeline

    classify = pipeline("text-classification", str(folder), top_k=None)
    return [{entry["label"]: entry["score"] for entry in found} for found in classify(texts)]


def assert_same_scores(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_report_names_who_ran_each_op(finished: Any) -> None:
    folder, report = finished("lora")
    found = report.metrics["ops"]
    assert {"lora_linear, float32", "cross_entropy, float32", "dropout, float32"} <= set(found)
    page = (folder / "report.html").read_text()
    for key, by in found.items():
        served = fasttune.ops.backend(key.partition(",")[0])
        assert (by["name"], by["why"]) == (served.name, served.why)
        assert f"op {key}: by {served.name}" in page


@pytest.mark.parametrize("kind", ["full", "head", "lora"])
def test_every_strategy_learns(finished: Any, kind: str) -> None:
    _, report = finished(kind)
    assert report.metrics["valid"]["accuracy"] >= 0.75, "chance is 0.33"
    assert report.metrics["train_loss"] < 1.0986, "the loss of a guess among three classes"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_folder_holds_what_the_run_promises_and_no_leftovers(finished: Any, kind: str) -> None:
    run, report = finished(kind)
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {"config.yaml", "metrics.jsonl", "metrics.json", "report.html", "checkpoints", "best", "last"}
    assert not [path for path in run.rglob("*") if path.name.startswith((".staging", ".old"))]
    assert report.folder == run
    assert json.loads((run / "metrics.json").read_text()) == report.metrics
    page = (run / "report.html").read_text()
    assert "text-classification" in page
    assert "accuracy" in page
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_metrics_jsonl_has_a_line_a_step_and_one_an_evaluation(finished: Any) -> None:
    run, report = finished("lora")
    steps, evaluations = read_lines(run)
    assert [record["step"] for record in steps] == list(range(1, 12 * 6 + 1))
    assert [record["step"] for record in evaluations] == list(range(6, 12 * 6 + 1, 6))
    assert sum(record["rows"] for record in steps) == 12 * 48
    rates = [record["lr"] for record in steps]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(5e-3, rel=0.02)
    assert all(record["taken"] for record in steps)
    best = max(evaluations, key=lambda record: (record["metrics"]["accuracy"], -record["metrics"]["loss"]))
    assert report.metrics["best_step"] == best["step"]
    assert report.metrics["valid"]["accuracy"] == best["metrics"]["accuracy"]


def test_few_checkpoints_stay_and_the_best_is_one_of_them(finished: Any) -> None:
    run, report = finished("lora")
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert set(kept) == {report.metrics["best_step"], 66, 72}


@pytest.mark.parametrize("kind", ["full", "head", "lora"])
def test_evaluate_gives_what_the_run_reported(finished: Any, toy_files: Any, kind: str) -> None:
    run, report = finished(kind)
    found = fasttune.load(run).evaluate(toy_files.valid)
    assert found == report.metrics["valid"]


@pytest.mark.parametrize("kind", ["full", "head"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_a_transformers_pipeline_gives_our_scores(finished: Any, texts: list[str], kind: str, which: str) -> None:
    run, _ = finished(kind)
    found = pipeline_scores(run / which, texts)
    if which == "best":
        ours = fasttune.load(run).predict([{"text": text} for text in texts])
        assert_same_scores(found, [prediction["scores"] for prediction in ours])
    assert {tuple(sorted(scores)) for scores in found} == {("drink", "fruit", "tool")}


def test_peft_gives_our_logits(finished: Any, tiny_bert: Path, texts: list[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, _ = finished("lora")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    theirs = PeftModel.from_pretrained(base, str(run / "best")).eval()
    ours = fasttune.load(run).bundle.model
    batch = AutoTokenizer.from_pretrained(run / "best")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = theirs(**batch).logits, ours(**batch).logits
    assert expected.std() > 0.1, "logits that say nothing would prove nothing"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_exported_lora_run_is_a_plain_model_with_our_scores(
    finished: Any, texts: list[str], tmp_path: Path
) -> None:
    run, _ = finished("lora")
    before = fasttune.load(run).predict([{"text": text} for text in texts])
    fasttune.load(run).export(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert_same_scores(pipeline_scores(tmp_path / "merged", texts), [row["scores"] for row in before])
    assert "drink, fruit, tool" in (tmp_path / "merged" / "README.md").read_text()


def test_export_does_not_write_over_anything(finished: Any, tmp_path: Path) -> None:
    run, _ = finished("full")
    with pytest.raises(ConfigError, match="exists already"):
        fasttune.load(run).export(tmp_path)


def test_predictions_keep_the_order_of_the_rows(finished: Any, texts: list[str]) -> None:
    model = fasttune.load(finished("full")[0])
    forward = model.predict([{"text": text} for text in texts])
    backward = model.predict([{"text": text} for text in reversed(texts)])
    assert [p["label"] for p in forward] == [p["label"] for p in reversed(backward)]


def test_the_written_config_gives_the_same_run_again(finished: Any, tmp_path: Path) -> None:
    run, report = finished("full")
    config = configs.load(run / "config.yaml", [f"output={tmp_path / 'again'}"])
    assert config.train.lr == 1e-3
    assert config.provenance["labels"] == ["drink", "fruit", "tool"]
    again = fasttune.finetune(config, quiet=True)
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert again.metrics["valid"] == report.metrics["valid"]


@pytest.mark.parametrize("lr", [1e-30, 1e-7], ids=["nothing changes", "the loss falls, the metric stays"])
def test_early_stopping_goes_by_the_primary_metric(
    tiny_bert: Path, toy_files: Any, tmp_path: Path, lr: float
) -> None:
    report = fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        data={"train": toy_files.train, "valid": toy_files.valid},
        strategy="head",
        train={"batch": 48, "epochs": 40, "lr": lr, "precision": "fp32"},
        eval={"patience": 2},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    assert report.metrics["steps"] == 3
    assert fasttune.load(tmp_path / "run").labels == ["drink", "fruit", "tool"]


def test_bad_rows_left_out_are_listed(
    tiny_bert: Path, toy_rows: Any, toy_files: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    rows = [*toy_rows["train"], {"text": "", "label": "tool"}]
    report = fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        data={
            "train": write_jsonl(tmp_path / "train.jsonl", rows),
            "valid": toy_files.valid,
            "on_error": "skip",
            "max_skip": 0.05,
        },
        train={"steps": 1, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    assert report.metrics["train_rows"] == 48
    listed = [json.loads(line) for line in (tmp_path / "run" / "data_report.jsonl").read_text().splitlines()]
    assert [(bad["row"], bad["column"]) for bad in listed] == [(49, "text")]
    assert listed[0]["file"].endswith("train.jsonl")
    assert "empty" in listed[0]["why"]
