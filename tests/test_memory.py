"""Kept memory, each check in a process of its own, for the allocator is there for good.

As a program this file runs the checks, each in a fork of one interpreter, and prints what failed as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttune.memory import keep_pages, keeps_pages
from fasttune.ops import library

KIB, MIB = 2**10, 2**20
LARGE = 64 * KIB  # from here on blocks are ours
needs_kernel = pytest.mark.skipif(
    library._C is None or not sys.platform.startswith("linux"), reason="no compiled allocator"
)


def kept_bytes() -> tuple[int, int]:
    """In tensors now, and the most that ever was touched."""
    live, touched = library._C.kept_bytes()
    return live, touched


def block(size: int, value: int = 0) -> torch.Tensor:
    return torch.full((size,), value % 251, dtype=torch.uint8)


def holds(tensor: torch.Tensor, value: int) -> bool:
    return bool((tensor == value % 251).all())


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a forked child, by way of JSON; not in more than a minute."""
    sys.stdout.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(60)
        try:
            said = {"returned": function(*arguments)}
        except BaseException:  # noqa: BLE001 what it was is told to the parent
            said = {"raised": traceback.format_exc()}
        with os.fdopen(write, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    said = json.loads(text)
    assert "raised" not in said, said["raised"]
    return said["returned"]


def check_sizes_alignment_and_contents() -> None:
    assert keep_pages()
    sizes = [0, 1, 63, 64, 1000, LARGE - 1, LARGE, LARGE + 1, 100_003, MIB, 5 * MIB + 17, 40 * MIB]
    tensors = [block(size, i) for i, size in enumerate(sizes)]
    for i, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert tensor.numel() == size
        assert tensor.data_ptr() % 64 == 0
        assert holds(tensor, i)
    rounded = sum((size + 63) // 64 * 64 for size in sizes if size >= LARGE)
    assert kept_bytes()[0] == rounded, "large blocks are ours, small ones are not"
    del tensors, tensor
    assert kept_bytes()[0] == 0


def check_neighbours_become_one() -> None:
    assert keep_pages()
    start = kept_bytes()[0]
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)):
        three: list[torch.Tensor | None] = [block(MIB, i) for i in range(3)]
        places = [tensor.data_ptr() for tensor in three]
        assert places == [places[0], places[0] + MIB, places[0] + 2 * MIB]
        wall = block(MIB)  # behind them, so that they can't melt into what never was touched
        for i in order:
            three[i] = None
        whole = block(3 * MIB)
        assert whole.data_ptr() == places[0]
        del whole, wall
    assert kept_bytes() == (start, 4 * MIB)


def check_touched_stays_bounded_under_changing_sizes() -> None:
    """Batches of changing length: what tears glibc's heap into holes."""
    assert keep_pages()
    chance = random.Random(5)
    held: list[tuple[torch.Tensor, int]] = []
    peak = 0
    for step in range(4000):
        if held and (len(held) > 40 or chance.random() < 0.5):
            tensor, value = held.pop(chance.randrange(len(held)))
            assert holds(tensor[:64], value)
            assert holds(tensor[-64:], value)
            del tensor
        size = int(LARGE * 2 ** (6 * chance.random()))  # 64 KiB to 4 MiB
        tensor = torch.empty(size, dtype=torch.uint8)
        tensor[:64] = tensor[-64:] = step % 251
        held.append((tensor, step))
        del tensor
        peak = max(peak, kept_bytes()[0])
    assert kept_bytes()[1] <= 2 * peak, (kept_bytes(), peak)
    held.clear()
    live, touched = kept_bytes()
    assert live == 0
    whole = torch.empty(touched, dtype=torch.uint8)
    assert kept_bytes() == (touched, touched), "all that was touched is one free piece again"
    del whole


def check_threads_at_once() -> None:
    assert keep_pages()
    faults: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        held = []
        for step in range(150):
            held.append((block(chance.randrange(1000, 600 * KIB), seed + step), seed + step))
            if len(held) > 8:
                tensor, value = held.pop(chance.randrange(8))
                if not holds(tensor, value):
                    faults.append(f"thread {seed}, step {step}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    gc.collect()
    assert kept_bytes()[0] == 0


def check_blocks_made_by_one_thread_and_freed_by_another() -> None:
    assert keep_pages()
    held = [block(MIB, i) for i in range(8)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert kept_bytes()[0] == 0


def check_a_fork_can_allocate_while_threads_do() -> None:
    """A lock held by another thread at the fork would never open in the child."""
    assert keep_pages()
    mine = block(MIB, 7)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            torch.empty(200 * KIB, dtype=torch.uint8)

    def child() -> bool:
        torch.set_num_threads(1)
        before = kept_bytes()[0]
        own = block(3 * MIB, 9)
        right = holds(own, 9) and holds(mine, 7) and kept_bytes()[0] == before + 3 * MIB
        mine.fill_(1)
        return right

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            assert in_fork(child)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert holds(mine, 7), "a child's writes are its own"


def check_memory_shared_with_numpy() -> None:
    import numpy as np

    assert keep_pages()
    tensor = torch.arange(100_000)
    array = tensor.numpy()
    del tensor
    gc.collect()
    others = [block(800_000, i) for i in range(4)]
    assert (array == np.arange(100_000)).all(), "numpy's array holds the block"
    del array, others
    gc.collect()
    assert kept_bytes()[0] == 0
    tensor = torch.from_numpy(np.arange(100_000))
    assert kept_bytes()[0] == 0
    gc.collect()
    assert torch.equal(tensor, torch.arange(100_000))


def check_tensors_made_before_are_freed_by_whom_they_came_from() -> None:
    before = [block(size, i) for i, size in enumerate((100, LARGE, MIB, 30 * MIB))]
    assert keep_pages()
    after = [block(MIB, i) for i in range(4)]
    grown = before[2].resize_(2 * MIB)
    assert holds(grown[:MIB], 2)
    assert kept_bytes()[0] == 4 * MIB
    before.clear()
    del grown
    assert kept_bytes()[0] == 4 * MIB
    assert all(holds(tensor, i) for i, tensor in enumerate(after))


def check_storages_grow_and_shrink() -> None:
    assert keep_pages()
    tensor = block(1000, 5)  # a small block that becomes a large one
    tensor.resize_(2 * MIB)
    assert holds(tensor[:1000], 5)
    assert kept_bytes()[0] == 2 * MIB
    tensor.fill_(6)
    tensor.untyped_storage().resize_(4 * MIB)
    assert holds(tensor, 6)
    assert kept_bytes()[0] == 4 * MIB
    tensor.untyped_storage().resize_(0)
    assert kept_bytes()[0] == 0


def check_what_does_not_fit_comes_from_pytorch() -> None:
    assert keep_pages()
    room = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = torch.empty(room - MIB, dtype=torch.uint8)  # addresses alone: nothing is touched
    beside = block(4 * MIB, 3)
    assert kept_bytes()[0] == room - MIB
    assert holds(beside, 3)
    for size in (2**62, 2**63 - 64):
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(size, dtype=torch.uint8)
    del most, beside
    assert kept_bytes()[0] == 0


def check_no_addresses_left_is_told() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + 256 * MIB, -1))
    assert not keep_pages()
    assert not keeps_pages()
    assert holds(block(MIB, 3), 3)


def faults_of_ten_steps(keep: bool) -> int:
    """Page faults of ten steps after a first one; each step fills and frees 96 MiB."""
    torch.set_num_threads(1)
    assert keep_pages() == keep if keep else not keeps_pages()

    def step() -> None:
        for size in (64 * MIB, 24 * MIB, 8 * MIB):
            block(size, 1)

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def check_steps_no_longer_fault_their_pages_in() -> None:
    kept, given_back = (in_fork(faults_of_ten_steps, keep) for keep in (True, False))
    # Huge pages, where the system has them for all, are 46 faults a step; small ones 24,576.
    assert given_back > 10 * 40, given_back
    assert kept < given_back / 10, (kept, given_back)


def check_twice_is_once() -> None:
    assert not keeps_pages()
    assert keep_pages()
    held = block(MIB, 3)
    before = kept_bytes()
    assert keep_pages()
    assert keeps_pages()
    assert kept_bytes() == before
    assert holds(held, 3)


def check_the_profiler_sees_the_blocks() -> None:
    from torch.profiler import ProfilerActivity, profile

    assert keep_pages()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = torch.empty(5 * MIB, dtype=torch.uint8)
    del held
    events = {event.key: event for event in profiler.key_averages()}
    assert events["aten::empty"].self_cpu_memory_usage == 5 * MIB


def check_fasttune_run_switches_it_on() -> None:
    from click.testing import CliRunner

    import fasttune.run
    from fasttune.cli import main

    seen = []

    def finetune(*_: Any, **__: Any) -> None:
        seen.append(keeps_pages())
        raise SystemExit(0)

    fasttune.run.finetune = finetune
    data = [
        part
        for name in ("--data", "--valid", "--model")
        for part in (name, os.environ[f"CHECK_{name[2:].upper()}"])
    ]
    result = CliRunner().invoke(main, ["run", "text-classification", *data])
    assert result.exit_code == 0, result.output
    assert seen == [True]


def check_a_library_call_leaves_it_off() -> None:
    import fasttune

    assert not keeps_pages(), "import fasttune must not switch it on"
    torch.set_num_threads(1)
    fasttune.finetune(
        task="text-classification",
        model=os.environ["CHECK_MODEL"],
        data={"train": os.environ["CHECK_DATA"], "valid": os.environ["CHECK_VALID"]},
        strategy={"kind": "head"},
        train={"batch": 48, "epochs": 1, "precision": "fp32"},
        output=os.environ["CHECK_OUTPUT"],
    )
    assert not keeps_pages()


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures(tiny_bert: Path, toy_files: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name, the traceback of each check that failed."""
    paths = {"data": toy_files.train, "valid": toy_files.valid, "model": tiny_bert}
    paths["output"] = tmp_path_factory.mktemp("kept") / "run"
    environment = os.environ | {f"CHECK_{name.upper()}": str(path) for name, path in paths.items()}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    return json.loads(run.stdout.splitlines()[-1])


@needs_kernel
@pytest.mark.parametrize("name", CHECKS)
def test_kept_memory(name, failures):
    assert name not in failures, failures[name]


@needs_kernel
def test_tensors_may_outlive_the_interpreter():
    code = (
        "import atexit, torch; from fasttune.memory import keep_pages\n"
        "assert keep_pages()\n"
        "held = torch.ones(10**6); torch.kept = torch.ones(10**6); held.itself = held\n"
        "atexit.register(lambda: torch.ones(10**6).sum())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_without_kernels_it_says_that_it_is_off():
    code = (
        "import torch; from fasttune.memory import keep_pages, keeps_pages\n"
        "print(keep_pages(), keeps_pages(), torch.ones(10**6).sum().item())"
    )
    environment = os.environ | {"FASTTUNE_REFERENCE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False", "1000000.0"]


def main() -> None:
    failed = {}
    for name in CHECKS:
        try:
            in_fork(globals()[name])
        except AssertionError as error:
            failed[name] = str(error)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
