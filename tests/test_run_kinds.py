"""What every run promises: exact accumulation, equal runs, fixed hold-out; and other kinds of answers."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import fasttune
from fasttune import config as configs
from fasttune.errors import DataError, TrainingError
from fasttune.prepare import open_tables, open_task
from fasttune.progress import Progress
from fasttune.signals import Signals


@pytest.fixture(scope="module")
def without_dropout(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "no-dropout"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def weights_of(run: Path) -> dict[str, Any]:
    found = next((run / "last").glob("*.safetensors"))
    return load_file(found)


@pytest.mark.parametrize("strategy", [{"kind": "full"}, {"kind": "lora", "dropout": 0.0}], ids=["full", "lora"])
def test_four_micro_batches_of_eight_are_one_of_thirty_two(
    without_dropout: str, toy_rows: Any, toy_files: Any, write_jsonl: Any, tmp_path: Path, strategy: Any
) -> None:
    """45 rows: the last batch has 13, cut unevenly; class weights make the count differ from the rows. With SGD,
    since AdamW blows the rounding of a gradient near zero up to a whole step."""
    data = {"train": write_jsonl(tmp_path / "train.jsonl", toy_rows["train"][:45]), "valid": toy_files.valid}
    train = {"epochs": 3, "batch": 32, "lr": 0.1, "precision": "fp32", "optimizer": {"kind": "sgd"}}
    weights = {}
    for pieces in (1, 4):
        fasttune.finetune(
            task="text-classification",
            model=without_dropout,
            options={"class_weights": {"drink": 2.0, "tool": 0.5}},
            data=data,
            strategy=strategy,
            train={**train, "accumulation": pieces},
            output=str(tmp_path / f"by-{pieces}"),
            quiet=True,
        )
        weights[pieces] = weights_of(tmp_path / f"by-{pieces}")
    start = load_file(Path(without_dropout, "model.safetensors"))
    moved = 0.0
    for name, whole in weights[1].items():
        np.testing.assert_allclose(weights[4][name], whole, atol=2e-6, rtol=2e-5, err_msg=name)
        if name.removeprefix("bert.") in start:
            moved = max(moved, float((whole - start[name.removeprefix("bert.")]).abs().max()))
        elif "lora_B" in name:
            moved = max(moved, float(whole.abs().max()))
    assert moved > 1e-3, "weights that stay where they were prove nothing"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_config_twice_gives_the_same_bits(
    tiny_bert: Path, toy_files: Any, tmp_path: Path, precision: str
) -> None:
    runs = []
    for number in (1, 2):
        np.random.seed(number)  # a state of the process that must not matter
        random.seed(number)
        fasttune.finetune(
            task="text-classification",
            model=str(tiny_bert),
            data={"train": toy_files.train, "valid": toy_files.valid},
            strategy="full",
            train={"epochs": 2, "batch": 8, "lr": 1e-3, "precision": precision},
            output=str(tmp_path / str(number)),
            quiet=True,
        )
        runs.append((tmp_path / str(number) / "last" / "model.safetensors").read_bytes())
    assert runs[0] == runs[1]


def strictly(text: str) -> Any:
    """JSON as every other reader takes it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("problem", ["single", "regression"])
def test_a_model_that_broke_is_reported_in_plain_json(
    tiny_bert: Path, toy_rows: Any, write_jsonl: Any, tmp_path: Path, problem: str
) -> None:
    """One step with an absurd rate: the gradient was finite, the weights overflow, valid gives NaN."""
    rows = [
        {"text": row["text"], "label": row["label"] if problem == "single" else 1.0} for row in toy_rows["train"]
    ]
    table = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        options={"problem": problem},
        data={"train": table, "valid": table},
        strategy="full",
        train={"steps": 1, "lr": 1e30, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    evaluation = strictly((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluation["metrics"]["loss"] is None
    assert strictly((tmp_path / "run" / "metrics.json").read_text())["valid"]["loss"] is None
    assert any("not finite" in warning for warning in report.warnings)


def test_steps_that_are_not_finite_end_the_run_with_the_rows(
    tiny_bert: Path, toy_files: Any, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"3 steps in a row; the last batch held rows \[\d+, .*\]"):
        fasttune.finetune(
            task="text-classification",
            model=str(tiny_bert),
            data={"train": toy_files.train, "valid": toy_files.valid},
            strategy="full",
            train={"steps": 8, "batch": 8, "lr": 1e30, "precision": "fp32"},
            output=str(tmp_path / "run"),
            quiet=True,
        )
    lines = [strictly(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["taken"] for line in lines] == [True, False, False, False]


def test_a_tilde_is_the_home_folder(
    tiny_bert: Path, toy_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_bert, tmp_path / "home" / "bert")
    fasttune.finetune(
        task="text-classification",
        model="~/bert",
        data={"train": toy_files.train, "valid": toy_files.valid},
        train={"steps": 1, "precision": "fp32"},
        output="~/run",
        quiet=True,
    )
    assert (tmp_path / "home" / "run" / "best").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_another_seed_gives_another_run(tiny_bert: Path, toy_files: Any, tmp_path: Path) -> None:
    losses = []
    for seed in (1, 2):
        report = fasttune.finetune(
            task="text-classification",
            model=str(tiny_bert),
            data={"train": toy_files.train, "valid": toy_files.valid},
            train={"steps": 2, "batch": 8, "precision": "fp32", "seed": seed},
            output=str(tmp_path / str(seed)),
            quiet=True,
        )
        losses.append(report.metrics["train_loss"])
    assert losses[0] != losses[1]


def held_out(train: str, share: float, seed: int = 17) -> tuple[list[str], Counter[str], int]:
    """Texts of valid, its rows by class, and how many rows train keeps."""
    config = configs.build(
        {
            "task": "text-classification",
            "model": "none",
            "data": {"train": train, "valid": share},
            "train": {"seed": seed},
        }
    )
    _, task = open_task(config)
    tables = open_tables(config, task, Progress(quiet=True), Signals())
    rows = [tables.valid.read(i) for i in range(len(tables.valid))]
    kept = {tables.train.read(i)["text"] for i in range(len(tables.train))}
    assert not kept & {row["text"] for row in rows}
    return sorted(row["text"] for row in rows), Counter(row["label"] for row in rows), len(tables.train)


def test_held_out_rows_are_stratified_and_always_the_same(toy_rows: Any, write_jsonl: Any, tmp_path: Path) -> None:
    rows = toy_rows["train"]
    first, classes, kept = held_out(write_jsonl(tmp_path / "a.jsonl", rows), 0.25)
    assert set(classes.values()) == {4}
    assert kept == 36
    shuffled = random.Random(1).sample(rows, len(rows))
    other_columns = [{"label": row["label"], "extra": 1, "text": row["text"]} for row in shuffled]
    assert held_out(write_jsonl(tmp_path / "b.jsonl", other_columns), 0.25, seed=99)[0] == first
    # Rows that come later push hardly any row from one side to the other.
    fewer = held_out(write_jsonl(tmp_path / "c.jsonl", rows[:-6]), 0.25)[0]
    assert len(set(first) & set(fewer)) >= 8


def test_equal_inputs_stay_on_one_side(toy_rows: Any, write_jsonl: Any, tmp_path: Path) -> None:
    rows = [row for row in toy_rows["train"][:24] for _ in range(3)]
    texts, classes, _ = held_out(write_jsonl(tmp_path / "train.jsonl", rows), 0.3)
    assert set(Counter(texts).values()) == {3}
    assert len(classes) == 3


def test_equal_inputs_with_different_labels_stay_on_one_side(write_jsonl: Any, tmp_path: Path) -> None:
    """Annotators disagree: the same text, in both classes, would be in train and in valid."""
    rows = [{"text": f"text {i}", "label": label} for i in range(200) for label in ("yes", "no")]
    rows += [{"text": f"more {i}", "label": "no"} for i in range(250)]
    held_out(write_jsonl(tmp_path / "train.jsonl", rows), 0.3)


def test_a_warning_if_valid_repeats_rows_of_train(
    tiny_bert: Path, toy_files: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        data={"train": toy_files.train, "valid": toy_files.train},
        train={"steps": 1, "precision": "fp32"},
        output=str(tmp_path / "run"),
    )
    assert "48 rows of valid are in train too" in capfd.readouterr().err


def test_what_is_validated_on_is_written_out(tiny_bert: Path, toy_files: Any, tmp_path: Path) -> None:
    fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        data={"train": toy_files.train},
        train={"steps": 1, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    assert configs.load(tmp_path / "run" / "config.yaml").data.valid == configs.SHARE_HELD_OUT


def test_multi_label(tiny_bert: Path, toy_rows: Any, write_jsonl: Any, tmp_path: Path) -> None:
    """Two texts in one, and the classes of both."""
    rows = toy_rows["train"] + toy_rows["valid"]
    pairs = [
        {"text": f"{a['text']} {b['text']}", "labels": sorted({a["label"], b["label"]})}
        for a, b in zip(rows, rows[5:] + rows[:5], strict=True)
    ]
    report = fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        options={"problem": "multi"},
        data={
            "train": write_jsonl(tmp_path / "train.jsonl", pairs[:48]),
            "valid": write_jsonl(tmp_path / "valid.jsonl", pairs[48:]),
        },
        strategy="full",
        train={"epochs": 12, "batch": 8, "lr": 1e-3, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    always_all = _f1_of_naming_all(pairs[48:])
    assert report.metrics["valid"]["micro_f1"] > always_all
    texts = [pair["text"] for pair in pairs[48:]]
    ours = fasttune.load(tmp_path / "run").predict([{"text": text} for text in texts])
    from transformers import pipeline

    theirs = pipeline("text-classification", str(tmp_path / "run" / "best"), top_k=None)(texts)
    for one, other in zip(ours, theirs, strict=True):
        assert one["scores"] == pytest.approx({entry["label"]: entry["score"] for entry in other}, abs=1e-5)
        assert one["labels"] == [name for name, score in one["scores"].items() if score >= 0.5]


def _f1_of_naming_all(rows: list[dict[str, Any]]) -> float:
    right = sum(len(row["labels"]) for row in rows)
    return 2 * right / (right + 3 * len(rows))


def test_regression(tiny_bert: Path, toy_rows: Any, write_jsonl: Any, tmp_path: Path) -> None:
    values = {"drink": 1.0, "fruit": 0.0, "tool": -1.0}
    files = {
        split: write_jsonl(
            tmp_path / f"{split}.jsonl", [{"text": r["text"], "score": values[r["label"]]} for r in rows]
        )
        for split, rows in toy_rows.items()
    }
    report = fasttune.finetune(
        task="text-classification",
        model=str(tiny_bert),
        options={"problem": "regression"},
        data=files,
        strategy="full",
        train={"epochs": 12, "batch": 8, "lr": 1e-3, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    spread = np.var([values[row["label"]] for row in toy_rows["valid"]])
    valid = report.metrics["valid"]
    assert valid["mse"] < 0.6 * spread
    assert valid["loss"] == pytest.approx(valid["mse"], rel=1e-5)
    predicted = fasttune.load(tmp_path / "run").predict(files["valid"])
    errors = [p["value"] - values[row["label"]] for p, row in zip(predicted, toy_rows["valid"], strict=True)]
    assert np.mean(np.square(errors)) == pytest.approx(valid["mse"], rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_from_class_folders(tiny_vit: Path, tmp_path: Path, invoke: Any, workers: int) -> None:
    from PIL import Image

    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    chance = np.random.default_rng(2)
    for split, count in (("train", 8), ("valid", 3)):
        for name, colour in colours.items():
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                size = (20 + 5 * number, 30, 3)
                noise = np.clip(chance.normal(colour, 60, size), 0, 255).astype(np.uint8)
                Image.fromarray(noise).save(tmp_path / split / name / f"{number}.png")
    report = fasttune.finetune(
        task="image-classification",
        model=str(tiny_vit),
        data={"train": str(tmp_path / "train"), "valid": str(tmp_path / "valid"), "workers": workers},
        strategy="full",
        train={"epochs": 4, "batch": 8, "lr": 1e-3, "precision": "fp32"},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    assert report.metrics["valid"]["accuracy"] == 1.0
    model = fasttune.load(tmp_path / "run")
    blue = str(tmp_path / "valid" / "blue" / "0.png")
    assert model.predict([{"image": blue}])[0]["label"] == "blue"
    from transformers import pipeline

    theirs = pipeline("image-classification", str(tmp_path / "run" / "best"), top_k=None)(blue)
    scores = {entry["label"]: entry["score"] for entry in theirs}
    assert scores == pytest.approx(model.predict([{"image": blue}])[0]["scores"], abs=1e-4)

    elsewhere = tmp_path / "tables" / "rows.csv"
    elsewhere.parent.mkdir()
    elsewhere.write_text("file_name,label\nblue/0.png,blue\nred/1.png,red\n")
    where = ("--data", str(elsewhere), "--root", str(tmp_path / "valid"))
    shown = invoke("predict", str(tmp_path / "run"), *where)
    assert [json.loads(line)["label"] for line in shown.stdout.splitlines()] == ["blue", "red"]
    assert json.loads(invoke("evaluate", str(tmp_path / "run"), *where, "--json").stdout)["accuracy"] == 1.0
    assert invoke("predict", str(tmp_path / "run"), *where[:2]).exit_code == 2
    pixels = [model.predict([{"image": name}], root=tmp_path / "valid") for name in ("blue/0.png", blue)]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_while_training_is_named(
    tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """All were whole when the run began; the message is no traceback, from another process neither."""
    from PIL import Image

    from fasttune import run as runs

    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            Image.effect_noise((30, 30), 20).convert("RGB").save(tmp_path / "data" / name / f"{number}.png")
    real = runs.prepare

    def prepare_and_lose_one(*arguments: Any) -> Any:
        prepared = real(*arguments)
        (tmp_path / "data" / "cat" / "2.png").unlink()
        return prepared

    monkeypatch.setattr(runs, "prepare", prepare_and_lose_one)
    with pytest.raises(DataError, match=r"data, row 3, column 'image': no file 'cat/2\.png'"):
        fasttune.finetune(
            task="image-classification",
            model=str(tiny_vit),
            data={"train": str(tmp_path / "data"), "valid": str(tmp_path / "data"), "workers": workers},
            strategy="full",
            train={"steps": 2, "precision": "fp32"},
            output=str(tmp_path / "run"),
            quiet=True,
        )


def test_what_a_gpu_kernel_found_wrong_with_a_label_stops_the_run_before_its_step(
    tiny_bert: Path, toy_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> None:
        raise IndexError("row 3: label 7 is out of range")

    monkeypatch.setattr("fasttune.train.raise_pending", found)
    with pytest.raises(IndexError, match="row 3"):
        fasttune.finetune(
            task="text-classification",
            model=str(tiny_bert),
            data={"train": toy_files.train, "valid": toy_files.valid},
            train={"steps": 2, "precision": "fp32"},
            output=str(tmp_path / "run"),
            quiet=True,
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
