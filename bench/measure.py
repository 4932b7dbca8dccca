"""What the benchmarks of single operations share: peak memory, the allocator's cure, and a table of ratios.

As a program it is the child of `peak_memory`: measure.py FILE FUNCTION [JSON ARGUMENTS].
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_pages() -> None:
    """From now on glibc keeps freed memory instead of giving its pages back and faulting them in again.

    For every contestant of a run, or for none: without it PyTorch's own ops, which allocate more, look worse.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


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


def assert_close(found: torch.Tensor, exact: torch.Tensor, epsilon: float) -> None:
    """A benchmark of a wrong result is worth nothing: error in norm, relative."""
    error = (found.double() - exact.double()).norm() / exact.double().norm()
    assert error <= epsilon, f"relative error {error:.1e} > {epsilon:.1e}: not worth timing"


@dataclass
class Table:
    """Collects what the tests of a module measure; conftest.py prints it when they are through.

    unit: of work a second: "GB/s" if `add` gets bytes, "GFLOP/s" if operations.
    floor: the name whose time the others' are divided by. base: the name whose time is divided by the others'.
    """

    unit: str
    floor: str
    base: str
    cells: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TABLES.append(self)

    def add(self, case: str, name: str, **figures: float) -> None:
        """figures: ms, work (bytes or operations a call), peak and gradients (bytes)."""
        self.cells.setdefault(case, {}).setdefault(name, {}).update(figures)

    def time(self, benchmark: Any, case: str, name: str, call: Callable[[], Any], work: float = 0) -> None:
        # Four calls first: an allocator that keeps pages has to get them once.
        benchmark.pedantic(call, rounds=7, warmup_rounds=4)
        if benchmark.stats is not None:
            self.add(case, name, ms=benchmark.stats.stats.median * 1e3, work=work)

    def lines(self) -> Iterator[str]:
        for case, rows in self.cells.items():
            yield f"{case}   (median of 5, {describe()})"
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


def describe() -> str:
    """The machine and the day, without which a figure means nothing."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    _child(*sys.argv[1:4])
