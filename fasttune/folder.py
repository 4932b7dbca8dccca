"""The run folder: one run at a time, and nothing of another run overwritten."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fasttune.config import RunConfig, load
from fasttune.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from PIL import Image

_LOCK = ".lock"


class RunFolder:
    """Paths of a run, and the lock that keeps a second run out while this one is entered."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.steps = self.path / "metrics.jsonl"
        self.metrics = self.path / "metrics.json"
        self.report = self.path / "report.html"
        self.data_report = self.path / "data_report.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.last = self.path / "last"
        self._lock: IO[str] | None = None

    def open(self, *, resume: bool) -> RunFolder:
        """Makes the folder and takes its lock.

        Raises OutputError if it can't be made, another process runs in it, or it holds another run's files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"output {self.path}: can't be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise OutputError(f"output {self.path}: in use by {holder}; choose another --output") from error
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name != _LOCK)
        if others and not resume:
            self.close()
            holds = "a run" if self.config.name in others else f"files, {others[0]!r} among them"
            how = (
                "go on with it by --resume, or choose another --output"
                if holds == "a run"
                else "choose another --output"
            )
            raise OutputError(f"output {self.path}: holds {holds} already; {how}")
        return self

    def close(self) -> None:
        """Gives the lock back; an emptied folder of a run that never began goes with it."""
        if self._lock is None:
            return
        if [entry.name for entry in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()
            self.path.rmdir()
        self._lock.close()
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def must_hold(self, config: RunConfig) -> None:
        """Raises CheckpointError if the folder holds a run with other settings, data or plugin, naming them."""
        if not self.config.exists():
            return
        before, now = (one.model_dump(mode="json") for one in (load(self.config), config))
        for record in (before, now):
            del record["output"], record["data"]["workers"]
            record["provenance"].pop("versions", None)
        changed = sorted(_differences(before, now))
        if changed:
            raise CheckpointError(
                f"{self.path}: --resume goes on with the same run, but this differs: {', '.join(changed)}; "
                "choose another --output to start a new one"
            )

    def need_space(self, bytes_needed: int) -> None:
        """Raises OutputError if the disk has less room than the run is going to write."""
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed:
            raise OutputError(
                f"output {self.path}: {free:,} bytes are free on its disk, but checkpoints and models of the run "
                f"need about {bytes_needed:,}; free some, choose another --output, or keep fewer with save.keep"
            )

    def append(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        try:
            with self.steps.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(record)) + "\n")
        except OSError as error:
            raise OutputError(f"{self.steps}: can't be written: {error.strerror}; --resume goes on") from error

    def forget_after(self, step: int) -> None:
        """Drops lines of metrics.jsonl that a resumed run is going to write again."""
        if not self.steps.exists():
            return
        kept = []
        for line in self.steps.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed while writing it
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        write_text(self.steps, "".join(kept))


def plain(value: Any) -> Any:
    """A JSON value without NaN and infinity, which JSON has no words for: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: whole, or as it was."""
    staged = path.with_name(f".staging-{path.name}")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG in one step, and the folders that it lies in."""
    staged = path.with_name(f".staging-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(staged, format="PNG")
        staged.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Keys whose values differ, as "section.key"."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [path]
    keys = before.keys() | now.keys()
    inner = ((before.get(key), now.get(key), f"{path}.{key}" if path else str(key)) for key in keys)
    return [found for one in inner for found in _differences(*one)]
