"""Checkpoints under faults: each operation on the disk fails once, each file is damaged once.

A writer that takes no care must fail the same test, or the test would prove nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fasttune
from fasttune import checkpoint
from fasttune.batching import Position
from fasttune.checkpoint import Checkpoints, Disk, State, replace_folder, verify
from fasttune.errors import CheckpointError, OutputError


def make_state(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(7, 5, generator=generator), "b": torch.randn(3, generator=generator)}
    moments = {f"{name}/exp_avg": tensor * 2 for name, tensor in weights.items()}
    return State(step, Position(1, step), weights, moments, {"norm": torch.ones(2) * step}, {"best": step / 7})


def assert_holds(checkpoints: Checkpoints, step: int) -> None:
    """The checkpoint of this step is there, whole, and what was written."""
    found, expected = checkpoints.load(step), make_state(step)
    assert (found.step, found.position, found.progress) == (expected.step, expected.position, expected.progress)
    for group in ("masters", "optimizer", "buffers"):
        ours, theirs = getattr(found, group), getattr(expected, group)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)


class FailingDisk(Disk):
    """Fails at operation number `fail_at`, half done where an operation can be; counts operations from 1.

    crash: nothing more reaches the disk afterwards, as if the process had been killed.
    """

    def __init__(self, fail_at: int = 0, crash: bool = False):
        self.fail_at, self.crash, self.count = fail_at, crash, 0

    def _due(self) -> bool:
        self.count += 1
        if self.crash and self.count > self.fail_at > 0:
            raise OSError(errno.EIO, "gone")
        return self.count == self.fail_at

    @staticmethod
    def _fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def make_folder(self, path: Path) -> None:
        if self._due():
            self._fail()
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        if self._due():
            path.write_bytes(data[: len(data) // 2])
            self._fail()
        super().write(path, data)

    def write_tensors(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if self._due():
            super().write_tensors(path, tensors)
            os.truncate(path, path.stat().st_size // 2)
            self._fail()
        crash, self.count = self.crash, self.count - 1  # its sync is part of the same operation
        self.crash = False
        fail_at, self.fail_at = self.fail_at, 0
        try:
            super().write_tensors(path, tensors)
        finally:
            self.crash, self.fail_at = crash, fail_at

    def sync(self, path: Path) -> None:
        if self._due():
            self._fail()
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._due():
            self._fail()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        if self._due():
            for half in sorted(path.iterdir())[::2]:
                half.unlink()
            self._fail()
        super().remove(path)


class CarelessCheckpoints(Checkpoints):
    """What most tools do: writes straight into the final folder, and removes the old one first."""

    def _write(self, target: Path, state: State, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        for step in self.steps():
            self.disk.remove(self.path(step))
        self.disk.make_folder(target)
        for name, group in tensors.items():
            self.disk.write_tensors(target / f"{name}.safetensors", group)
        self.disk.write_tensors(target / "random.safetensors", {"cpu": torch.get_rng_state()})
        record = {"step": state.step, "position": vars(state.position), "progress": state.progress}
        self.disk.write(target / "state.json", json.dumps(record).encode())
        self.disk.write(target / "manifest.json", json.dumps(checkpoint.manifest(target)).encode())


def failing_at_each_operation(
    kind: type[Checkpoints], folder: Path, crash: bool
) -> Iterator[tuple[Checkpoints, int, bool]]:
    """(checkpoints as a new process finds them, number of the operation that failed, whether the save said so),
    for a second save in a folder of its own; ends with the first one in which nothing fails."""
    for number in range(1, 100):
        place = folder / f"{kind.__name__}-{crash}-{number}"
        kind(place, keep=1).save(make_state(1), protect=set())
        disk = FailingDisk(number, crash)
        said = False
        try:
            kind(place, keep=1, disk=disk).save(make_state(2), protect=set())
        except OutputError:
            said = True
        yield Checkpoints(place, keep=1), number, said
        if disk.count < number:
            return
    raise AssertionError("a save takes more than 100 operations")


@pytest.mark.parametrize("crash", [False, True], ids=["fails", "killed"])
def test_whatever_operation_fails_a_whole_checkpoint_stays(tmp_path: Path, crash: bool) -> None:
    failed = 0
    for checkpoints, number, said in failing_at_each_operation(Checkpoints, tmp_path, crash):
        newest, _ = checkpoints.newest()
        assert newest in (1, 2), f"nothing is left after operation {number}"
        assert_holds(checkpoints, newest)
        assert all(not verify(checkpoints.path(step)) for step in checkpoints.steps() if step == newest)
        failed += said
        # The next run can save in that folder, and does not stumble over what was left.
        checkpoints.save(make_state(3), protect=set())
        assert_holds(checkpoints, 3)
        assert checkpoints.steps() == [3]
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-000003"]
    assert failed >= 8, "folder, four times tensors, two times JSON, sync, rename, sync, remove"


@pytest.mark.parametrize("crash", [False, True], ids=["fails", "killed"])
def test_a_careless_writer_fails_that_test(tmp_path: Path, crash: bool) -> None:
    nothing_left = [
        number
        for checkpoints, number, _ in failing_at_each_operation(CarelessCheckpoints, tmp_path, crash)
        if checkpoints.newest()[0] is None
    ]
    assert len(nothing_left) >= 5


def test_the_message_names_cause_and_size(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"step-000001: .*no space is left on the disk; about [\d,]+ bytes"):
        Checkpoints(tmp_path, disk=FailingDisk(2)).save(make_state(1), protect=set())


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(make_state(step), protect=set())
    return checkpoints


FILES = ("trained.safetensors", "optimizer.safetensors", "buffers.safetensors", "random.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "lengthen"])
def test_damage_is_found_and_the_one_before_used(saved: Checkpoints, name: str, damage: str) -> None:
    path = saved.path(2) / name
    data = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "truncate":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
        case "lengthen":
            path.write_bytes(data + b"\0")
    newest, faults = saved.newest()
    assert newest == 1
    assert len(faults) == 1
    assert "step-000002" in faults[0]
    assert name in faults[0]
    assert_holds(saved, 1)
    with pytest.raises(CheckpointError, match=name):
        saved.load(2)


def test_every_flipped_bit_is_found(saved: Checkpoints) -> None:
    chance = random.Random(8)
    files = [path for path in saved.path(2).iterdir() if path.name != "manifest.json"]
    for _ in range(300):
        path = chance.choice(files)
        data = bytearray(path.read_bytes())
        place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        assert verify(saved.path(2)), f"bit {bit} of byte {place} of {path.name}"
        data[place] ^= bit
        path.write_bytes(data)
    assert verify(saved.path(2)) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "null", "{}", '{"state.json": 3}', '{"state.json": {}}']
)
def test_a_damaged_manifest_is_never_believed(saved: Checkpoints, content: str) -> None:
    (saved.path(2) / "manifest.json").write_text(content)
    newest, faults = saved.newest()
    assert newest == 1
    assert "manifest.json" in faults[0]


def test_a_manifest_that_forgets_a_file_is_not_believed(saved: Checkpoints) -> None:
    path = saved.path(2) / "manifest.json"
    entries = json.loads(path.read_text())
    del entries["trained.safetensors"]
    path.write_text(json.dumps(entries))
    assert saved.newest()[0] == 1


def test_nothing_at_all(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest() == (None, [])


def test_old_ones_go_but_neither_the_protected_nor_the_last_whole_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(make_state(step), protect={2})
    assert checkpoints.steps() == [2, 4, 5]
    # 4 and 5 are damaged: 2 is all that verifies, and newer damaged ones must not push it out.
    for step in (4, 5):
        os.truncate(checkpoints.path(step) / "state.json", 3)
    checkpoints.save(make_state(3), protect=set())
    newest, faults = checkpoints.newest()
    assert newest == 3
    assert len(faults) == 2


def test_a_step_saved_again_replaces_a_damaged_one_only(saved: Checkpoints) -> None:
    os.truncate(saved.path(2) / "state.json", 3)
    saved.save(make_state(2), protect=set())
    assert_holds(saved, 2)
    before = (saved.path(2) / "manifest.json").stat().st_mtime_ns
    saved.save(make_state(2), protect=set())
    assert (saved.path(2) / "manifest.json").stat().st_mtime_ns == before, "a whole checkpoint never changes"


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]

    random.gauss(0, 1)  # Python keeps the second value of a pair for the next call
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), protect=set())
    expected = draw()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    checkpoints.restore_random(1)
    assert draw() == expected


def test_a_checkpoint_holds_no_pickle(saved: Checkpoints) -> None:
    assert {path.name for path in saved.path(2).iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize("crash", [False, True], ids=["fails", "killed"])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, crash: bool) -> None:
    """best/ and last/: after a failure one whole version exists, under its own name or as `.old-`."""
    for number in range(1, 30):
        place = tmp_path / f"{crash}-{number}"
        for name, text in (("best", "old"), (".staging-best", "new")):
            (place / name).mkdir(parents=True)
            (place / name / "a").write_text(text)
            (place / name / "b").write_text(text)
        disk = FailingDisk(number, crash)
        with contextlib.suppress(OSError):
            replace_folder(place / ".staging-best", place / "best", disk)
        found = [place / name for name in ("best", ".old-best") if (place / name).is_dir()]
        whole = [
            path
            for path in found
            if sorted(p.name for p in path.iterdir()) == ["a", "b"]
            and len({p.read_text() for p in path.iterdir()}) == 1
        ]
        assert whole, f"operation {number} left {sorted(p.name for p in place.iterdir())}"
        if disk.count < number:
            assert (place / "best" / "a").read_text() == "new"
            assert [path.name for path in place.iterdir()] == ["best"]
            return
    raise AssertionError("never ended")


@pytest.fixture
def start(tiny_bert: Path, toy_files: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(**named: Any) -> Any:
        return fasttune.finetune(
            task="text-classification",
            model=str(tiny_bert),
            data={"train": toy_files.train, "valid": toy_files.valid},
            train={"steps": 4, "batch": 8, "precision": "fp32"},
            save={"every": 2},
            output=str(tmp_path / "run"),
            quiet=True,
            **named,
        )

    return run


def test_a_disk_that_fills_up_ends_the_run_and_resume_goes_on(start: Callable[..., Any], tmp_path: Path) -> None:
    """At several places of the run: the message is plain, and --resume finishes with a whole best/."""
    with pytest.raises(OutputError, match="no space is left on the disk"):
        start(disk=FailingDisk(15))
    for number in (3, 25, 31, 40):
        try:
            start(resume=True, disk=FailingDisk(number))
        except OutputError as error:
            assert "no space" in str(error).lower()  # noqa: PT017
    report = start(resume=True)
    assert report.metrics["steps"] == 4
    assert fasttune.load(tmp_path / "run").labels == ["drink", "fruit", "tool"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith((".staging", ".old"))]
