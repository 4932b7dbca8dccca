"""What the benchmarks of single operations share: peak memory, and a table of ratios.

As a program it is the child of `peak_memory`: measure.py FILE FUNCTION [JSON ARGUMENTS].
"""

from __future__ import annotations

import ctypes
import gc
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttune.bench import Race, machine

DTYPES = ["float32", "bfloat16"]
SECONDS = 5.0  # of turns a table
M_MMAP_THRESHOLD = -3  # malloc.h


def sized(sizes: Mapping[str, list[tuple[int, ...]]]) -> pytest.MarkDecorator:
    """Parametrizes a test by device and by the sizes that are meant for it."""
    cases = [("cpu", size) for size in sizes["cpu"]]
    gpu = [pytest.param("cuda", size, marks=pytest.mark.gpu) for size in sizes["cuda"]]
    return pytest.mark.parametrize(("device", "size"), cases + gpu * torch.cuda.is_available(), ids=_name)


def _name(value: Any) -> str:
    return value if isinstance(value, str) else "x".join(map(str, value))


def peak_memory(file: str, function: str, *arguments: Any, device: str = "cpu") -> int:
    """Bytes that one call takes at its worst above what was there before it, what it returns included.

    function: the name of one in `file` that takes the arguments (JSON's types), prepares the inputs and returns
        the callable to be measured. Its first call, which loads and compiles, does not count.

    On CPU it is the growth of the resident set, in a process of its own whose allocator gives freed pages back.
    """
    if device == "cuda":
        call = runpy.run_path(file)[function](*arguments)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, file, function, json.dumps(arguments)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _child(file: str, function: str, arguments: str) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)  # a fixed one: else glibc raises it after the first large free
    call = runpy.run_path(file)[function](*json.loads(arguments))
    call()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here: proc(5)
    before = _status("VmRSS")
    call()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@dataclass
class Table:
    """Collects what the tests of a module measure; conftest.py prints it when they are through.

    unit: of work a second: "GB/s" if `race` gets bytes, "GFLOP/s" if operations.
    floor: the name whose time the others' are divided by. base: the name whose time is divided by the others'.
    """

    unit: str
    floor: str
    base: str
    cells: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TABLES.append(self)

    def add(self, case: str, name: str, **figures: float) -> None:
        """figures: ms, work (bytes or operations a call), peak and gradients (bytes)."""
        self.cells.setdefault(case, {}).setdefault(name, {}).update(figures)

    def race(self, benchmark: Any, case: str, calls: Mapping[str, Callable[[], Any]], work: float) -> None:
        """Times the calls in turns. pytest-benchmark's own figure is a round of all of them; each one's median is
        in its `extra_info`. With benchmarks disabled each is called, and nothing is noted."""
        if not benchmark.enabled:
            benchmark(lambda: [call() for call in calls.values()])
            return
        race = Race(calls)
        self.rounds[case] = race.rounds(SECONDS)
        benchmark.pedantic(race.round, rounds=self.rounds[case])
        for name, seconds in race.medians().items():
            self.add(case, name, ms=seconds * 1e3, work=work)
            benchmark.extra_info[f"{name}, ms"] = seconds * 1e3

    def lines(self) -> Iterator[str]:
        for case, rows in self.cells.items():
            counted = f"median of {self.rounds[case]} rounds" if case in self.rounds else "memory only"
            yield f"{case}   ({counted}, {machine()})"
            yield (
                f"{'':28}{'ms':>9}{self.unit:>9}{'x ' + self.floor:>16}{self.base + ' /':>12}"
                f"{'peak MB':>10}{'less grads':>12}"
            )
            base, floor = (rows.get(name, {}).get("ms") for name in (self.base, self.floor))
            for name, got in rows.items():
                ms, peak = got.get("ms"), got.get("peak")
                yield f"{name:28}" + "".join(
                    (
                        f"{ms:9.2f}" if ms else f"{'-':>9}",
                        f"{got['work'] / ms / 1e6:9.0f}" if ms and got.get("work") else f"{'-':>9}",
                        f"{ms / floor:16.2f}" if ms and floor else f"{'-':>16}",
                        f"{base / ms:12.2f}" if ms and base else f"{'-':>12}",
                        f"{peak / 1e6:10.1f}" if peak is not None else f"{'-':>10}",
                        f"{(peak - got['gradients']) / 1e6:12.1f}" if peak is not None else f"{'-':>12}",
                    )
                )
            yield ""


TABLES: list[Table] = []

if __name__ == "__main__":
    _child(*sys.argv[1:4])
