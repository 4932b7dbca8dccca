"""Signals from outside, to processes of their own: nothing is lost, and --resume ends as if none had come."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def command(tiny_bert: Path, toy_files: Any, output: Path, *settings: str) -> list[str]:
    """A process that trains, for `Popen`."""
    code = "import torch; torch.set_num_threads(1); from fasttune.cli import main; main()"
    data = ["--data", toy_files.train, "--valid", toy_files.valid, "--output", str(output)]
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-c", code, "run", "text-classification", "--model", str(tiny_bert), *data, *sets]


def signal_at_first_step(arguments: list[str], signum: int) -> tuple[int, str]:
    """Exit status and stderr of a process that gets a signal once its first step is shown."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("step 1/"):
            process.send_signal(signum)
    return process.wait(), said


def test_sigterm_from_outside(tiny_bert: Path, toy_files: Any, tmp_path: Path) -> None:
    """The real thing: a process of its own, stopped in the middle, exits with 143 and says how to go on."""
    arguments = command(tiny_bert, toy_files, tmp_path / "run", "train.steps=100000")
    status, said = signal_at_first_step(arguments, signal.SIGTERM)
    assert status == 143, said
    assert "stopped by SIGTERM while" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) >= 1


def test_kill_at_any_moment(
    start: Any, assert_same_run: Any, tiny_bert: Path, toy_files: Any, tmp_path: Path
) -> None:
    """SIGKILL leaves no time to save: whatever lies there, --resume ends where the undisturbed run ends."""
    settings = ("train.batch=16", "train.steps=12", "train.lr=1e-3", "train.precision=fp32", "save.every=1")
    status, _ = signal_at_first_step(command(tiny_bert, toy_files, tmp_path / "killed", *settings), signal.SIGKILL)
    assert status == -signal.SIGKILL
    sections = {"train": {"steps": 12, "epochs": 3.0}, "save": {"every": 1}}
    start(tmp_path / "killed", "lora", resume=True, quiet=True, **sections)
    start(tmp_path / "whole", "lora", quiet=True, **sections)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
