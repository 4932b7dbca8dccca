"""What a person reads afterwards: metrics.json and report.html, with the dangers made visible."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune.progress import scalars

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}
.warn{background:#fff3cd;padding:.6em 1em;border-left:4px solid #e0a800}
svg{background:#fafafa;border:1px solid #ddd}pre{background:#f6f6f6;padding:1em;overflow:auto}"""


@dataclass(frozen=True)
class Report:
    """What `finetune` returns. metrics: what metrics.json holds. folder: the run folder."""

    folder: Path
    metrics: dict[str, Any]
    warnings: list[str]


def dangers(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the curves tell of overfitting and of a wrong learning rate; empty if they look healthy.

    steps, evaluations: records of metrics.jsonl, in order.
    """
    found = []
    skipped = sum(not record["taken"] for record in steps)
    if skipped:
        found.append(f"{skipped} steps were skipped: their loss or gradient was not finite. Lower train.lr.")
    losses = [record["loss"] for record in steps if record["loss"] is not None]
    quarter = max(1, len(losses) // 4)
    start, end = _mean(losses[:quarter]), _mean(losses[-quarter:])
    if len(losses) >= 20 and end > start:
        found.append(f"The training loss rose from {start:.3f} to {end:.3f}: train.lr is probably too high.")
    elif len(losses) >= 20 and end > 0.98 * start:
        found.append(f"The training loss hardly moved ({start:.3f} to {end:.3f}): train.lr is probably too low.")
    broken = [record["step"] for record in evaluations if record["metrics"]["loss"] is None]
    if broken:
        found.append(f"The loss on valid was not finite at step {broken[0]}: the model broke. Lower train.lr.")
    evaluations = [record for record in evaluations if record["metrics"]["loss"] is not None]
    valid = [record["metrics"]["loss"] for record in evaluations]
    if len(valid) >= 2 and valid[-1] > 1.05 * min(valid) and end < start:
        best = evaluations[valid.index(min(valid))]["step"]
        found.append(
            f"The loss on valid was lowest at step {best} ({min(valid):.3f}) and rose to {valid[-1]:.3f} while "
            "the loss on train fell: the model overfits. Train for fewer epochs, or set eval.patience."
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations of a metrics.jsonl."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "metrics" in r]


def render(
    title: str,
    metrics: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    notes: Sequence[str],
    config: str,
) -> str:
    """report.html: one file that needs nothing else."""
    valid = metrics["valid"]
    measured, rows = metrics["valid_rows_measured"], metrics["valid_rows"]
    of = f", {measured:,} of its {rows:,} rows" if measured < rows else ""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *[f'<p class="warn">{html.escape(warning)}</p>' for warning in warnings],
        f"<h2>On valid{of}</h2>",
        _table(["metric", "value"], [[name, f"{value:.4f}"] for name, value in scalars(valid).items()]),
        _per_class(valid),
        _confusion(valid),
        _samples(metrics.get("samples", [])),
        "<h2>Loss</h2>",
        _curves(steps, evaluations),
        "<h2>The run</h2>",
        _table(["", "value"], [[name, _short(value)] for name, value in scalars(metrics).items()]),
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>",
        f"<pre>{html.escape(config)}</pre>",
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _short(value: float | None) -> str:
    """None, what can't be measured (a class without small objects), is a dash."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _per_class(valid: Mapping[str, Any]) -> str:
    per_class = valid.get("per_class")
    if not isinstance(per_class, Mapping) or not per_class:
        return ""
    columns = list(next(iter(per_class.values())))
    rows = [[name, *(_short(entry[column]) for column in columns)] for name, entry in per_class.items()]
    return "<h2>By class</h2>" + _table(["class", *columns], rows)


def _confusion(valid: Mapping[str, Any]) -> str:
    """The most frequent confusions, worst first."""
    confusion = valid.get("confusion")
    if not isinstance(confusion, Mapping):
        return ""
    labels, counts = confusion["classes"], confusion["counts"]
    pairs = [
        (counts[i][j], labels[i], labels[j])
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j and counts[i][j]
    ]
    rows = [[truth, predicted, count] for count, truth, predicted in sorted(pairs, reverse=True)[:15]]
    return "<h2>Most frequent confusions</h2>" + _table(["is", "taken for", "rows"], rows) if rows else ""


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """A few predictions beside what their rows hold."""
    if not samples:
        return ""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    roles = list(dict.fromkeys(role for sample in samples for role in sample["holds"]))
    rows = [
        [sample["row"], *(text(sample["holds"].get(role, "")) for role in roles), text(sample["prediction"])]
        for sample in samples
    ]
    return "<h2>Samples of valid</h2>" + _table(["row", *roles, "prediction"], rows)


def _curves(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Training loss (line) and loss on valid (dots) over steps, as SVG."""
    train = [(record["step"], record["loss"]) for record in steps if record["loss"] is not None]
    points = ((record["step"], record["metrics"]["loss"]) for record in evaluations)
    valid = [(step, loss) for step, loss in points if loss is not None]
    if not train:
        return ""
    width, height, last = 760, 260, max(step for step, _ in train)
    top = max(loss for _, loss in train + valid) or 1.0

    def place(step: float, loss: float) -> str:
        return f"{40 + (width - 60) * step / last:.1f},{20 + (height - 50) * (1 - loss / top):.1f}"

    line = " ".join(place(*point) for point in train)
    dots = "".join(
        '<circle r="4" fill="#c33" cx="{}" cy="{}"/>'.format(*place(*point).split(",")) for point in valid
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="loss over steps">'
        f'<polyline fill="none" stroke="#36c" points="{line}"/>{dots}'
        f'<text x="44" y="16" font-size="12">{top:.3f}</text>'
        f'<text x="{width - 70}" y="{height - 8}" font-size="12">step {last}</text></svg>'
        "<p>Line: training loss. Dots: loss on valid.</p>"
    )
