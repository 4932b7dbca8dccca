"""`fasttune demo TASK`: the embedded model on the embedded data, by every strategy, side by side."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fasttune import config as configs
from fasttune.adapt import native_precision
from fasttune.batching import Loader
from fasttune.errors import FasttuneError
from fasttune.evaluate import evaluate
from fasttune.folder import write_image
from fasttune.inference import load as load_run
from fasttune.prepare import prepare
from fasttune.progress import Progress
from fasttune.run import finetune
from fasttune.signals import Signals
from fasttune.task import Demo, Metric, find, load, primary_metric

_DRAWN = 8  # rows of valid in the picture


def run_demo(task: str, output: str | None, say: Callable[[str], None]) -> dict[str, float]:
    """Runs every variant and prints the primary metric of each. Returns them by name.

    output: where the run folders and the picture go; if None, the runs go to a temporary folder that is removed,
    and the picture to runs/. Raises PluginError or FasttuneError if the task is missing or has no demo.
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
        tables = {split: folder / f"{split}.jsonl" for split in ("train", "valid")}
        for split, path in tables.items():
            write_rows(path, getattr(demo, split))
        if demo.before:
            began = time.perf_counter()
            reached["before"] = _untrained(_settings(task, demo, tables, demo.variants[-1][1]), metric)
            say(f"{'before':18}{reached['before']:10.3f}{time.perf_counter() - began:10.1f}")
        for name, variant in demo.variants:
            began = time.perf_counter()
            settings = _settings(task, demo, tables, variant)
            report = finetune(quiet=True, output=str(_run_of(folder, name)), **settings)
            reached[name] = report.metrics["valid"][metric.name]
            say(f"{name:18}{reached[name]:10.3f}{time.perf_counter() - began:10.1f}")
        if demo.picture is not None:
            better = max if metric.best == "max" else min
            best = better((name for name, _ in demo.variants), key=lambda name: reached[name])
            path = Path(output, "demo.png") if output else Path("runs", f"demo-{task.rpartition(':')[2]}.png")
            write_image(path, demo.picture(_drawn(_run_of(folder, best), tables["valid"])))
            say(f"\npicture: {path}: the first rows held out, as {best} sees them")
    if output:
        say(f"\nruns: {output}")
    return reached


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of JSON lines; images become PNG files in a folder of its name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        line = dict(row)
        for role, value in row.items():
            if isinstance(value, Image.Image):
                line[role] = f"{path.stem}/{i + 1:06d}.png"
                write_image(path.parent / line[role], value)
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _settings(task: str, demo: Demo, tables: Mapping[str, Path], variant: Mapping[str, Any]) -> dict[str, Any]:
    data = {split: str(path) for split, path in tables.items()}
    return {"task": task, "model": demo.model, "data": data, **variant}


def _run_of(folder: Path, variant: str) -> Path:
    return folder / variant.replace(" ", "-")


def _untrained(settings: Mapping[str, Any], metric: Metric) -> float:
    """The metric of the model as a run with these settings finds it, its new head as it is drawn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configs.resolve(configs.build(settings), precision=native_precision(device))
    with Signals() as signals:
        prepared = prepare(config, Progress(quiet=True), signals)
    prepared.bundle.model.to(device)
    valid = Loader(prepared.valid, prepared.bundle.padding)
    return float(evaluate(prepared.task, prepared.bundle, valid, config.eval.batch or 1)[metric.name])


def _drawn(run: Path, table: Path) -> list[Image.Image]:
    """Pictures of the table's first rows with what the run's best model finds."""
    with table.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, _DRAWN)]
    with tempfile.TemporaryDirectory() as folder:
        load_run(run).predict(rows, root=table.parent, draw=folder)
        return [Image.open(path).convert("RGB") for path in sorted(Path(folder).iterdir())]
