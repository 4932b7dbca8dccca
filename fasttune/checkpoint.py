"""Checkpoints that are whole or not there: staged, synced, renamed; verified before they are believed.

A checkpoint is a folder that never changes: files, then `manifest.json` with their sizes and sha256, written under
a staging name, synced to disk and renamed. No pickle is written or read: tensors are safetensors, the rest JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttune.batching import Position
from fasttune.errors import CheckpointError, OutputError

_STAGING = ".staging-"
_MANIFEST = "manifest.json"
_GROUPS = ("trained", "optimizer", "buffers")


class Disk:
    """Every operation that changes a disk goes through here, so that tests can make each of them fail."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write(self, path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        self.sync(path)

    def sync(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


@dataclass
class State:
    """All that a run needs to go on as if it had never stopped.

    step: optimizer steps taken. masters: fp32 values of what is trained. optimizer: its tensors.
    buffers: the model's persistent buffers. progress: JSON-able state of the run itself (best value, ...).
    """

    step: int
    position: Position
    masters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    buffers: dict[str, Tensor]
    progress: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, in `folder`/step-NNNNNN."""

    def __init__(self, folder: Path, keep: int = 2, disk: Disk | None = None):
        self.folder, self.keep, self.disk = folder, keep, disk or Disk()

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints, verified or not, in ascending order."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def save(self, state: State, protect: set[int]) -> None:
        """Writes a checkpoint and then removes old ones, but never those of the steps in `protect`.

        Raises OutputError, naming cause and size, if it can't be written; earlier checkpoints stay as they were.
        """
        target = self.path(state.step)
        if target.exists() and not verify(target):
            return
        tensors = dict(zip(_GROUPS, (state.masters, state.optimizer, state.buffers), strict=True))
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        try:
            self._write(target, state, tensors)
            self._purge({*protect, state.step})
        except (OSError, safetensors.SafetensorError) as error:
            raise OutputError(
                f"{target}: the checkpoint can't be written: {disk_fault(error)}; about {needed:,} bytes are "
                "needed. Earlier checkpoints are as they were."
            ) from error

    def _write(self, target: Path, state: State, tensors: dict[str, dict[str, Tensor]]) -> None:
        for left in self.folder.glob(f"{_STAGING}*"):  # by a run that was killed while writing
            self.disk.remove(left)
        staging = self.folder / f"{_STAGING}{target.name}"
        self.disk.make_folder(staging)
        for name, group in tensors.items():
            self.disk.write_tensors(staging / f"{name}.safetensors", group)
        self.disk.write_tensors(staging / "random.safetensors", _random_tensors())
        record = {
            "step": state.step,
            "position": asdict(state.position),
            "progress": state.progress,
            "random": _random_json(),
        }
        self.disk.write(staging / "state.json", json.dumps(record, indent=1).encode())
        self.disk.write(staging / _MANIFEST, json.dumps(manifest(staging), indent=1).encode())
        self.disk.sync(staging)
        if target.exists():  # it was there and did not verify
            self.disk.remove(target)
        self.disk.rename(staging, target)
        self.disk.sync(self.folder)

    def _purge(self, protect: set[int]) -> None:
        for step in self.steps()[: -self.keep]:
            if step not in protect:
                self.disk.remove(self.path(step))

    def newest(self) -> tuple[int | None, list[str]]:
        """The newest step that verifies, and what is wrong with each newer one."""
        faults: list[str] = []
        for step in reversed(self.steps()):
            fault = verify(self.path(step))
            if not fault:
                return step, faults
            faults.append(f"{self.path(step)}: {fault}")
        return None, faults

    def load(self, step: int) -> State:
        """Raises CheckpointError if it doesn't verify."""
        path = self.path(step)
        fault = verify(path)
        if fault:
            raise CheckpointError(f"{path}: {fault}")
        record = json.loads((path / "state.json").read_text())
        masters, optimizer, buffers = (load_file(path / f"{name}.safetensors") for name in _GROUPS)
        position = Position(**record["position"])
        return State(record["step"], position, masters, optimizer, buffers, record["progress"])

    def restore_random(self, step: int) -> None:
        """Puts every random generator where it was when the checkpoint was written."""
        path = self.path(step)
        state = json.loads((path / "state.json").read_text())["random"]
        tensors = load_file(path / "random.safetensors")
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors["cpu"])
        for index in range(torch.cuda.device_count()):
            if f"cuda:{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda:{index}"], index)


def _random_json() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def _random_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return states


def manifest(folder: Path) -> dict[str, Any]:
    """Size and sha256 of every file of a folder."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != _MANIFEST
    }


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is what its manifest says."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text())
        unlisted = {path.name for path in folder.iterdir()} - {*expected, _MANIFEST}
        if unlisted or not expected:
            return f"{_MANIFEST} does not list {', '.join(sorted(unlisted)) or 'any file'}"
        for name, entry in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} holds {path.stat().st_size} bytes, {entry['bytes']} were written"
            if _sha256(path) != entry["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} can't be read: {error}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_fault(error: Exception) -> str:
    """What went wrong with a disk, in words."""
    if isinstance(error, OSError) and error.errno:
        return "no space is left on the disk" if error.errno == errno.ENOSPC else os.strerror(error.errno)
    return str(error)


def replace_folder(staged: Path, target: Path, disk: Disk) -> None:
    """Puts a staged folder in the place of `target`, which stays whole until the new one is."""
    for path in staged.rglob("*"):
        if path.is_file():
            disk.sync(path)
    disk.sync(staged)
    old = target.with_name(f".old-{target.name}")
    if old.exists():
        disk.remove(old)
    if target.exists():
        disk.rename(target, old)
    disk.rename(staged, target)
    disk.sync(target.parent)
    if old.exists():
        disk.remove(old)
