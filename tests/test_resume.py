"""Stopped and resumed runs end as if nothing had happened; a run that differs is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttune import run as runs
from fasttune.errors import CheckpointError, OutputError, Stopped
from fasttune.report import Report

Start = Callable[..., Report]


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """signal_after(n): from now on this process gets a SIGTERM when step n has been taken."""
    wanted: list[int | None] = [None]
    log = runs._Run._log

    def log_and_signal(self: Any, record: Any) -> None:
        log(self, record)
        if record.step == wanted[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    def choose(step: int | None) -> None:
        wanted[0] = step

    monkeypatch.setattr(runs._Run, "_log", log_and_signal)
    return choose


SGD = {"optimizer": {"kind": "sgd"}, "schedule": "cosine", "lr": 1e-2, "accumulation": 3}


@pytest.mark.parametrize(
    ("kind", "train"),
    [("lora", {}), ({"kind": "full", "layer_decay": 0.8, "gradual_unfreezing": 0.7}, {}), ("full", SGD)],
    ids=["lora", "full", "sgd"],
)
def test_stopped_after_every_single_step(
    assert_same_run: Any, start: Start, signal_after: Any, tmp_path: Path, kind: Any, train: dict[str, Any]
) -> None:
    start(tmp_path / "whole", kind, quiet=True, train=train)
    for step in range(1, 7):
        signal_after(step)
        with pytest.raises(Stopped, match=f"SIGTERM while .*step-{step:06d}") as stopped:
            start(tmp_path / "pieces", kind, resume=step > 1, quiet=True, train=train)
        assert stopped.value.exit_status == 143
    signal_after(None)
    start(tmp_path / "pieces", kind, resume=True, quiet=True, train=train)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_kept_features_survive_a_stop(
    assert_same_run: Any,
    start: Start,
    signal_after: Any,
    tiny_distilbert: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    start(tmp_path / "whole", "head", model=tiny_distilbert)
    assert "computed once" in capfd.readouterr().err
    for step in (2, 4):
        signal_after(step)
        with pytest.raises(Stopped):
            start(tmp_path / "pieces", "head", resume=step > 2, quiet=True, model=tiny_distilbert)
    signal_after(None)
    start(tmp_path / "pieces", "head", resume=True, quiet=True, model=tiny_distilbert)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_kept_features_change_nothing(start: Start, tiny_distilbert: Path, tmp_path: Path) -> None:
    """Without dropout in the head, kept features and those computed anew give one run, to rounding."""
    shutil.copytree(tiny_distilbert, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "seq_classif_dropout": 0.0}))
    losses = []
    for cache_gb in (2.0, 0.0, 1e-6):  # all kept, none kept, and too little room for all
        kind = {"kind": "head", "cache_gb": cache_gb}
        start(tmp_path / str(cache_gb), kind, quiet=True, model=tmp_path / "model", train={"lr": 1e-2})
        lines = (tmp_path / str(cache_gb) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss", 0.0) for line in lines])
    assert losses[0][0] != losses[0][-2], "a loss that doesn't move would prove nothing"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_stopped_while_evaluating(
    assert_same_run: Any,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    start(tmp_path / "whole", "lora", quiet=True)
    real = runs.evaluate

    def signal_first(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", signal_first)
        with pytest.raises(Stopped, match="SIGINT while evaluating") as stopped:
            start(tmp_path / "pieces", "lora", quiet=True)
    assert stopped.value.exit_status == 130
    start(tmp_path / "pieces", "lora", resume=True)
    assert "resumed after step 3 of 6" in capfd.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_stopped_while_preparing_leaves_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = runs.prepare

    def signal_first(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(runs, "prepare", signal_first)
    with pytest.raises(Stopped, match="while reading data"):
        start(tmp_path / "run", "lora", quiet=True)
    assert not (tmp_path / "run").exists()


def test_without_a_checkpoint_resume_starts_at_the_beginning(
    assert_same_run: Any, start: Start, signal_after: Any, tmp_path: Path
) -> None:
    start(tmp_path / "whole", "full", quiet=True)
    signal_after(2)
    with pytest.raises(Stopped):
        start(tmp_path / "killed", "full", quiet=True)
    signal_after(None)
    shutil.rmtree(tmp_path / "killed" / "checkpoints")  # as kill -9 before the first checkpoint leaves it
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a line that was being written
    start(tmp_path / "killed", "full", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    assert_same_run: Any,
    start: Start,
    signal_after: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    start(tmp_path / "whole", "lora", quiet=True, save={"every": 1, "keep": 3})
    signal_after(5)
    with pytest.raises(Stopped):
        start(tmp_path / "run", "lora", quiet=True, save={"every": 1, "keep": 3})
    signal_after(None)
    newest = tmp_path / "run" / "checkpoints" / "step-000005"
    match damage:
        case "flip":
            flip_a_bit(newest / "trained.safetensors")
        case "truncate":
            os.truncate(newest / "optimizer.safetensors", 100)
        case "remove":
            (newest / "state.json").unlink()
        case "manifest":
            (newest / "manifest.json").write_text('{"trained.safeten')
    start(tmp_path / "run", "lora", resume=True, save={"every": 1, "keep": 3})
    said = capfd.readouterr().err
    assert "step-000005" in said
    faulty = {"flip": "trained", "truncate": "optimizer", "remove": "state.json", "manifest": "manifest.json"}
    assert faulty[damage] in said
    assert "resumed after step 4 of 6" in said
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_damaged_best_checkpoint_does_not_cost_the_run(
    start: Start, signal_after: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """best/ can't be what it would have been; last/ and the metrics can, and the loss is said."""
    frozen = {"lr": 1e-30}  # nothing is learned, so the first evaluation, at step 3, stays the best
    signal_after(5)
    with pytest.raises(Stopped):
        start(tmp_path / "run", "lora", quiet=True, train=frozen)
    signal_after(None)
    flip_a_bit(tmp_path / "run" / "checkpoints" / "step-000003" / "trained.safetensors")
    report = start(tmp_path / "run", "lora", resume=True, train=frozen)
    assert "step-000003" in capfd.readouterr().err
    assert report.metrics["best_step"] == 6
    assert (tmp_path / "run" / "best").is_dir()
    assert (tmp_path / "run" / "last").is_dir()


def test_if_no_checkpoint_verifies_the_run_is_not_silently_started_anew(
    start: Start, signal_after: Any, tmp_path: Path
) -> None:
    signal_after(2)
    with pytest.raises(Stopped):
        start(tmp_path / "run", "lora", quiet=True)
    signal_after(None)
    flip_a_bit(tmp_path / "run" / "checkpoints" / "step-000002" / "trained.safetensors")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints verifies"):
        start(tmp_path / "run", "lora", resume=True, quiet=True)


@pytest.fixture
def stopped(start: Start, signal_after: Any, tmp_path: Path) -> Path:
    """A run folder that waits for --resume."""
    signal_after(2)
    with pytest.raises(Stopped):
        start(tmp_path / "run", "lora", quiet=True)
    signal_after(None)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"lr": 2e-3}}, "train.lr"),
        ({"train": {"epochs": 3}}, "train.epochs"),
        ({"data": {"valid": 0.25}}, "data.valid"),
        ({"options": {"max_length": 16}}, "options.max_length"),
        ({"eval": {"patience": 1}}, "eval.patience"),
    ],
)
def test_resume_refuses_another_config(start: Start, stopped: Path, sections: dict[str, Any], key: str) -> None:
    before = (stopped / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=rf"differs: .*{key}"):
        start(stopped, "lora", resume=True, quiet=True, **sections)
    assert (stopped / "config.yaml").read_bytes() == before


def test_resume_refuses_another_strategy_and_other_data(
    start: Start, stopped: Path, toy_rows: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"strategy\.rank"):
        start(stopped, {"kind": "lora", "rank": 8}, resume=True, quiet=True)
    before = (stopped / "config.yaml").read_text()
    data = write_jsonl(tmp_path / "data.jsonl", toy_rows["train"])
    (stopped / "config.yaml").write_text(before.replace(json.loads(json.dumps(_train_of(before))), data))
    write_jsonl(tmp_path / "data.jsonl", toy_rows["train"][:-1])
    with pytest.raises(CheckpointError, match=r"provenance\.data\.train"):
        start(stopped, "lora", resume=True, quiet=True, data={"train": data})


def _train_of(config: str) -> str:
    import yaml

    return yaml.safe_load(config)["data"]["train"]


def test_a_finished_run_resumed_trains_nothing_and_stays_as_it_is(
    without_timing: Any, start: Start, tmp_path: Path
) -> None:
    first = start(tmp_path / "run", "lora", quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = start(tmp_path / "run", "lora", resume=True, quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    assert without_timing(again.metrics) == without_timing(first.metrics)


def test_a_run_is_not_overwritten_without_resume(start: Start, stopped: Path) -> None:
    with pytest.raises(OutputError, match="holds a run already; go on with it by --resume"):
        start(stopped, "lora", quiet=True)
