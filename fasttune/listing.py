"""What `fasttune tasks` and `fasttune init` print. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

from fasttune import task as tasks
from fasttune.errors import PluginError
from fasttune.task import GROUP, Plugin


def list_tasks() -> dict[str, Any]:
    """All installed tasks, each loaded to see whether it works: a broken one costs only itself."""
    entries = [_entry(plugin) for plugin in tasks.installed()]
    lines = [f"{e['name']:32} {e['distribution']} {e['version']:12} {e['status']}" for e in entries]
    return {
        "tasks": entries,
        "text": lines or ["no tasks are installed; try: pip install fasttune-classification"],
    }


def _entry(plugin: Plugin) -> dict[str, Any]:
    status, problem = "ok", None
    if plugin.group != GROUP:
        version = plugin.group.rpartition(".")[2]
        status, problem = (
            "other contract",
            f"made for contract {version}, this fasttune speaks {GROUP.rpartition('.')[2]}",
        )
    else:
        try:
            tasks.load(plugin)
        except PluginError as error:
            status, problem = "broken", str(error)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.value,
        "ok": problem is None,
        "status": status if problem is None else f"{status}: {problem}",
    }


def describe_task(name: str) -> dict[str, Any]:
    """A task's columns, metrics and options. Raises PluginError if there is no such task or it is broken."""
    kind = tasks.load(tasks.find(name))
    task = kind()
    columns = [
        f"{column.role} ({column.kind}{'' if column.required else ', optional'}), also found as: "
        f"{', '.join(column.names[1:]) or 'nothing else'}"
        for column in task.columns
    ]
    metrics = [f"{metric.name} ({metric.best}{', primary' if metric.primary else ''})" for metric in task.metrics]
    options = [
        f"options.{key} = {field.get_default(call_default_factory=True)!r}  {field.description or ''}".rstrip()
        for key, field in kind.Options.model_fields.items()
    ]
    lines = ["columns:", *columns, "metrics:", *metrics, "options:", *options]
    text = [line if line.endswith(":") and " " not in line else f"  {line}" for line in lines]
    return {"columns": columns, "metrics": metrics, "options": options, "text": text}


_TEMPLATE = """\
# fasttune run file. Check it with `fasttune check`, run it with `fasttune run`.
task: {task}
model: MODEL                  # a hub id or a local directory
data:
  train: train.csv            # csv, tsv, json, jsonl, parquet, arrow, a folder of images or audio, a hub id
  valid: 0.1                  # a path, or the share of train that is held out
  columns: {{}}                 # only where names differ: {{{example}}}
  on_error: stop              # or skip: leave bad rows out, up to data.max_skip of them
strategy:
  kind: lora                  # full | head | lora
  rank: 16                    # lora only
options: {{}}                   # the task's own settings:
{options}
train:
  epochs: 3
  batch: 32                   # rows an optimizer step
  accumulation: 1             # micro-batches a batch is cut into, to save memory; the gradient stays the same
  # lr: 1e-3                  # default by strategy and model width
  seed: 17
# eval: {{patience: 2}}         # stop early
output: runs/{task}
"""


def run_file_template(name: str) -> str:
    """A commented run file. Raises PluginError if there is no such task."""
    kind = tasks.load(tasks.find(name))
    options = "\n".join(
        f"#   {key}: {json.dumps(field.get_default(call_default_factory=True), default=str)}".ljust(30)
        + f"# {field.description or ''}"
        for key, field in kind.Options.model_fields.items()
    )
    example = ", ".join(f"{column.role}: COLUMN" for column in kind().columns if column.required)
    return _TEMPLATE.format(task=name, options=options or "#   none", example=example)
