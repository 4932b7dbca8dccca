"""`fasttune demo TASK`: the embedded model on the embedded data, by every strategy, side by side."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttune.errors import FasttuneError
from fasttune.run import finetune
from fasttune.task import Demo, find, load, primary_metric


def run_demo(task: str, output: str | None, say: Callable[[str], None]) -> dict[str, float]:
    """Runs every variant and prints the primary metric of each. Returns them by name.

    output: where the run folders go; a temporary folder, removed afterwards, if None. Raises PluginError or
    FasttuneError if the task is missing or has no demo.
    """
    kind = load(find(task))
    try:
        demo = kind.demo()
    except RuntimeError as error:  # its data are not to be had on this machine
        raise FasttuneError(f"the demo of {task} can't be made here: {error}") from error
    if demo is None:
        raise FasttuneError(f"task {task} carries no demo")
    metric = primary_metric(kind())
    say(f"{demo.title}\n{len(demo.train)} rows to train on, {len(demo.valid)} held out. No network is used.\n")
    say(f"{'':18}{metric.name:>10}{'seconds':>10}")
    reached = dict(demo.baselines)
    for name, value in demo.baselines.items():
        say(f"{name:18}{value:10.3f}{'':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {split: folder / f"{split}.jsonl" for split in ("train", "valid")}
        for split, path in tables.items():
            rows = getattr(demo, split)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for name, settings in demo.variants:
            began = time.perf_counter()
            report = finetune(
                quiet=True, **_settings(task, demo, tables, folder / name.replace(" ", "-"), settings)
            )
            reached[name] = report.metrics["valid"][metric.name]
            say(f"{name:18}{reached[name]:10.3f}{time.perf_counter() - began:10.1f}")
    if output:
        say(f"\nruns: {output}")
    return reached


def _settings(task: str, demo: Demo, tables: dict[str, Path], folder: Path, variant: Any) -> dict[str, Any]:
    data = {split: str(path) for split, path in tables.items()}
    return {"task": task, "model": demo.model, "data": data, "output": str(folder), **variant}
