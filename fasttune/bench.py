"""`fasttune bench`: the ops and a training step against stock PyTorch, side by side on this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fasttune import __version__, contests
from fasttune.adapt import DTYPES, native_precision
from fasttune.errors import ConfigError, nearest
from fasttune.memory import keep_pages
from fasttune.ops import Backend, backend
from fasttune.rehearsal import rehearse

TURN = 5e-3  # seconds of calls, at the least, before the next contender has its turn
SECONDS = 2.0  # of turns, for one line of the table
FEWEST, MOST = 3, 51  # rounds

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "dropout": (2880, 384),
        "lora_linear": (2880, 384, 1536),
        "attention": (32, 12, 96, 32),
        "batch_norm": (8, 24, 128, 128),
        "deformable_attention": (8, 4, 32, 196, 64, 4),
        "cross_entropy": (1024, 32000),
        "linear_cross_entropy": (512, 768, 16000),
        "training_step": (32, 96, 384, 4),
    },
    "cuda": {
        "dropout": (16384, 4096),
        "lora_linear": (8192, 4096, 4096),
        "attention": (8, 32, 2048, 64),
        "batch_norm": (64, 256, 56, 56),
        "deformable_attention": (16, 8, 32, 300, 80, 4),
        "cross_entropy": (8192, 128256),
        "linear_cross_entropy": (4096, 4096, 128256),
        "training_step": (32, 512, 1024, 8),
    },
}
"""By device and op: the rows of a step with a small model on CPU, with a large one on a GPU. The order of the
numbers is that of the functions in `contests`, and of `rehearse`."""


class Race:
    """Times contenders in turns, so that whatever drifts on the machine hits all of them alike.

    calls: by name. `seconds` gets a figure a contender a round: seconds of one call. A turn is as many calls as
    take TURN, after one that is not timed where there are several: the caches hold what the contender before left.
    """

    def __init__(self, calls: Mapping[str, Callable[[], Any]]):
        self.calls = dict(calls)
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._repeats = {name: self._repeats_of(call) for name, call in self.calls.items()}

    def _repeats_of(self, call: Callable[[], Any]) -> int:
        for _ in range(2):  # what compiles or allocates does so now
            call()
        return max(1, round(TURN / _timed(call, 1)))

    def rounds(self, seconds: float) -> int:
        """How many rounds fit into that time, but FEWEST at the least and MOST at the most."""
        began = time.perf_counter()
        self.round()
        self.seconds = {name: [] for name in self.calls}
        return int(min(MOST, max(FEWEST, seconds / (time.perf_counter() - began))))

    def round(self) -> None:
        for name, call in self.calls.items():
            repeats = self._repeats[name]
            if repeats > 1:
                call()
            self.seconds[name].append(_timed(call, repeats) / repeats)

    def medians(self) -> dict[str, float]:
        return {name: median(found) for name, found in self.seconds.items()}


def _timed(call: Callable[[], Any], repeats: int) -> float:
    _synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine() -> str:
    """The device, its threads and the day, without which a figure means nothing."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.processor())} ({torch.backends.cpu.get_cpu_capability()})"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    ms: fasttune's. stock_ms: of each form that stock PyTorch has. ratio: how many times as long the fastest of
    them takes. backend, why: who runs fasttune's.
    """

    op: str
    size: tuple[int, ...]
    dtype: str
    backend: str
    why: str
    ms: float
    stock_ms: dict[str, float]
    ratio: float
    rounds: int


def bench(chosen: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Checks and times the chosen ops, all of them if none is chosen; says the table line by line.

    Tensors keep their pages meanwhile, for both sides (`fasttune.memory.keep_pages`): without that, PyTorch's own
    forms, which allocate more, would look worse. Raises ConfigError for an op there is none of, AssertionError for
    a wrong result.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = SIZES[device]
    for name in chosen:
        if name not in sizes:
            raise ConfigError(f"--op: nothing is called {name!r}.{nearest(name, sizes)} Known: {', '.join(sizes)}")
    kept = keep_pages()
    precisions = ("bf16", "fp32") if native_precision(torch.device(device)) == "bf16" else ("fp32",)
    head = {"fasttune": __version__, "machine": machine(), "device": device, "pages_kept": kept}
    say(f"fasttune {__version__}, {head['machine']}; forward and backward, medians")
    say(f"{'':21}{'size':22}{'type':6}{'backend':11}{'ms':>9}{'stock ms':>10}{'ratio':>7}  stock form")
    results = []
    for op in chosen or sizes:
        for precision in precisions:
            results.append(_compete(op, sizes[op], precision, device))
            say(_line(results[-1]))
    return {**head, "results": [asdict(result) for result in results]}


def _compete(op: str, size: tuple[int, ...], precision: str, device: str) -> Result:
    with _own_random_numbers():
        if op == "training_step":
            served = Backend("engine", "LoRALinear, dropout and attention as fasttune run has them")
            ours, stock = rehearse(size, DTYPES[precision], device)
        else:
            contest = getattr(contests, op)(size, DTYPES[precision], device)
            served = backend(op, *contest.arguments)
            ours = contest.checked(contests.OURS[op])
            stock = {name: contest.checked(function) for name, function in contests.STOCK[op].items()}
        race = Race({"fasttune": ours, **stock})
        rounds = race.rounds(SECONDS)
        for _ in range(rounds):
            race.round()
    found = {name: seconds * 1e3 for name, seconds in race.medians().items()}
    ms = found.pop("fasttune")
    ratio = min(found.values()) / ms
    return Result(op, size, precision, served.name, served.why, ms, found, ratio, rounds)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """One result does not hang on which ones came before, nor do the caller's numbers on any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _line(result: Result) -> str:
    best = min(result.stock_ms, key=lambda name: result.stock_ms[name])
    size = " x ".join(map(str, result.size))
    return (
        f"{result.op:21}{size:22}{result.dtype:6}{result.backend:11}{result.ms:9.2f}"
        f"{result.stock_ms[best]:10.2f}{result.ratio:7.2f}  {best}"
    )
