"""Stopped and resumed runs end as if nothing had happened; a run that differs is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import fasttune
from fasttune import run as runs
from fasttune.errors import CheckpointError, OutputError, Stopped
from fasttune.report import Report

Start = Callable[..., Report]
TIMING = {"seconds", "rows_per_s", "tokens_per_s", "peak_memory_bytes"}


@pytest.fixture
def start(tiny_bert: Path, toy_files: Any) -> Start:
    """start(output, kind, resume=..., **sections): a run of six steps in two epochs."""

    def run(output: Path, kind: str, resume: bool = False, **sections: Any) -> Report:
        train = {"batch": 16, "epochs": 2, "lr": 1e-3, "precision": "fp32", **sections.pop("train", {})}
        data = {"train": toy_files.train, "valid": toy_files.valid, **sections.pop("data", {})}
        return fasttune.finetune(
            task="text-classification",
            model=str(tiny_bert),
            data=data,
            strategy=kind,
            train=train,
            output=str(output),
            resume=resume,
            **sections,
        )

    return run


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


def without_timing(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMING}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random states, losses, sample order and metrics, bit by bit."""
    last = sorted((one / "checkpoints").iterdir())[-1].name
    for name in ("trained", "optimizer", "buffers", "random"):
        file = f"checkpoints/{last}/{name}.safetensors"
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), f"{file} differs"
    for folder in ("best", "last"):
        for weights in (one / folder).glob("*.safetensors"):
            assert weights.read_bytes() == (other / folder / weights.name).read_bytes(), f"{weights.name} differs"
    lines = [
        [without_timing(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]
    metrics = [without_timing(json.loads((run / "metrics.json").read_text())) for run in (one, other)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    "kind",
    ["lora", "head", {"kind": "full", "layer_decay": 0.8, "gradual_unfreezing": 0.7}],
    ids=["lora", "head", "full"],
)
def test_stopped_after_every_single_step(start: Start, signal_after: Any, tmp_path: Path, kind: Any) -> None:
    start(tmp_path / "whole", kind, quiet=True)
    for step in range(1, 7):
        signal_after(step)
        with pytest.raises(Stopped, match=f"SIGTERM while .*step-{step:06d}") as stopped:
            start(tmp_path / "pieces", kind, resume=step > 1, quiet=True)
        assert stopped.value.exit_status == 143
    signal_after(None)
    start(tmp_path / "pieces", kind, resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_stopped_while_evaluating(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    start: Start, signal_after: Any, tmp_path: Path
) -> None:
    import shutil

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
    start: Start, signal_after: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
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


def test_a_finished_run_resumed_trains_nothing_and_stays_as_it_is(start: Start, tmp_path: Path) -> None:
    first = start(tmp_path / "run", "lora", quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = start(tmp_path / "run", "lora", resume=True, quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    assert without_timing(again.metrics) == without_timing(first.metrics)


def test_a_run_is_not_overwritten_without_resume(start: Start, stopped: Path) -> None:
    with pytest.raises(OutputError, match="holds a run already; go on with it by --resume"):
        start(stopped, "lora", quiet=True)


def test_sigterm_from_outside(tiny_bert: Path, toy_files: Any, tmp_path: Path) -> None:
    """The real thing: a process of its own, stopped in the middle, exits with 143 and says how to go on."""
    code = "import torch; torch.set_num_threads(1); from fasttune.cli import main; main()"
    arguments = ["run", "text-classification", "--model", str(tiny_bert), "--data", toy_files.train]
    arguments += ["--valid", toy_files.valid, "--output", str(tmp_path / "run"), "--set", "train.steps=100000"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, said
    assert "stopped by SIGTERM while" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) >= 1
