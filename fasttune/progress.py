"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from fasttune.train import StepRecord

_WINDOW = 20  # steps that rates and the loss are averaged over
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Prints to stderr, so that stdout is for results."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.unit = quiet, "tokens"
        self.live = not quiet and sys.stderr.isatty()
        self._recent: deque[StepRecord] = deque(maxlen=_WINDOW)
        self._said = time.monotonic()
        self._bar: Any = None

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def preparing(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES and not self.quiet:
            self._said = time.monotonic()
            self.note(f"{what}: {done:,} of {total:,} rows")

    def step(self, record: StepRecord, steps: int, epoch: float, memory: int) -> None:
        self._recent.append(record)
        if self.quiet:
            return
        if self.live:
            self._show(self._line(record, steps, epoch, memory), record.step, steps)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES or record.step in (1, steps):
            self._said = time.monotonic()
            self.note(self._line(record, steps, epoch, memory))

    def rates(self) -> dict[str, float]:
        """Means over the last steps: loss, rows and units of cost a second, share of padding."""
        records = list(self._recent)
        seconds = sum(record.seconds for record in records)
        return {
            "loss": sum(record.loss for record in records) / len(records),
            "rows_per_s": sum(record.rows for record in records) / seconds,
            "cost_per_s": sum(record.cost for record in records) / seconds,
            "padding": 1 - sum(r.cost for r in records) / max(1, sum(r.padded_cost for r in records)),
            "seconds_per_step": seconds / len(records),
        }

    def _line(self, record: StepRecord, steps: int, epoch: float, memory: int) -> str:
        rates = self.rates()
        left = rates["seconds_per_step"] * (steps - record.step)
        return (
            f"step {record.step}/{steps}  epoch {epoch:.2f}  loss {rates['loss']:.4f}  lr {record.lr:.2e}  "
            f"{rates['rows_per_s']:.1f} rows/s  {rates['cost_per_s']:,.0f} {self.unit}/s  "
            f"padding {rates['padding']:.1%}  memory {memory / 1e9:.2f} GB  left {_duration(left)}"
        )

    def _show(self, line: str, step: int, steps: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            wrapped = Column(no_wrap=False)  # a narrow terminal gets more lines, not fewer numbers
            text = TextColumn("{task.description}", markup=False, table_column=wrapped)
            self._bar = Bar(BarColumn(bar_width=16), text, console=Console(stderr=True))
            self._bar.add_task(line, total=steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, description=line)

    def evaluated(self, step: int, metrics: Mapping[str, Any], better: bool) -> None:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in scalars(metrics).items())
        self.note(f"step {step} on valid: {numbers}{'  (best so far)' if better else ''}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are one number."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
