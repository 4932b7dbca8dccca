"""The command line. Bodies are short; whatever is heavy is imported inside them, so that --help needs no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fasttune import __version__
from fasttune.errors import BadRows, ConfigError, FasttuneError, Stopped

F = TypeVar("F", bound=Callable[..., Any])
_ROOT = click.option(
    "--root", metavar="DIR", help="Folder that paths of images and audio in --data are relative to."
)


class _Group(click.Group):
    """Prints a FasttuneError as its message alone, with its exit status."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except FasttuneError as error:
            click.echo(f"{'' if isinstance(error, Stopped) else 'error: '}{error}", err=True)
            context.exit(error.exit_status)
        except BrokenPipeError:  # the reader of our output has gone: `fasttune predict … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(1)

    def resolve_command(self, context: click.Context, arguments: list[str]) -> Any:
        from fasttune.errors import nearest

        if self.get_command(context, arguments[0]) is None:
            context.fail(f"no command {arguments[0]!r}.{nearest(arguments[0], self.list_commands(context))}")
        return super().resolve_command(context, arguments)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fasttune")
def main() -> None:
    """Fine-tune pretrained text, image and audio models on labelled data."""


def _run_arguments(command: F) -> F:
    """What `run` and `check` take: a run file, or a task with its data and model."""
    options = [
        click.argument("target", metavar="FILE.yaml | TASK"),
        click.option("--data", "train", metavar="PATH", help="Labelled rows: a file, a folder or a hub id."),
        click.option("--valid", metavar="PATH|SHARE", help="Labelled rows to validate on, or a share of --data."),
        click.option("--model", metavar="MODEL", help="A local directory or a hub id."),
        click.option("--strategy", metavar="KIND", help="full, head or lora."),
        click.option("--output", metavar="DIR", help="The run folder."),
        click.option(
            "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Any key of the run file; repeatable."
        ),
        click.option(
            "--trust-remote-code", "remote_code", metavar="REPO@COMMIT", help="Let this model's own code run."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _config(target: str, overrides: tuple[str, ...], **named: str | None) -> Any:
    """The RunConfig of a command line; named options win over the file, `--set` over both."""
    from fasttune import config

    keys = {
        "train": "data.train",
        "valid": "data.valid",
        "model": "model",
        "strategy": "strategy.kind",
        "output": "output",
    }
    given = [f"{keys[name]}={_yaml_text(value)}" for name, value in named.items() if value]
    if target.endswith((".yaml", ".yml")):
        return config.load(target, [*given, *overrides])
    if Path(target).is_file():
        raise ConfigError(f"{target}: a run file ends in .yaml; a table goes to --data")
    return config.build({"task": target}, [*given, *overrides], where="command line")


def _yaml_text(value: str) -> str:
    """Text stays text in YAML, but a share such as 0.1 is a number."""
    try:
        float(value)
    except ValueError:
        return json.dumps(value)
    return value


@main.command()
@_run_arguments
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run folder.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors and the result.")
def run(remote_code: str | None, resume: bool, quiet: bool, **arguments: Any) -> None:
    """Fine-tune a model: from a run file, or from a task with --data and --model."""
    config = _config(**arguments)
    from fasttune.memory import keep_pages
    from fasttune.run import finetune

    keep_pages()
    report = finetune(config, resume=resume, remote_code=remote_code, quiet=quiet)
    _print_report(report)


def _print_report(report: Any) -> None:
    from fasttune.progress import scalars

    for name, value in scalars(report.metrics["valid"]).items():
        click.echo(f"{name:12} {value:.4f}")
    click.echo(f"model: {report.folder / 'best'}\nreport: {report.folder / 'report.html'}")


@main.command()
@_run_arguments
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option(
    "--draw", metavar="FILE.png", help="Where a task with pictures draws its first samples; else beside --output."
)
def check(remote_code: str | None, as_json: bool, draw: str | None, **arguments: Any) -> None:
    """Read config, data and model, and train nothing: columns, samples, truncation, memory, bad rows."""
    config = _config(**arguments)
    from fasttune.check import check as check_run

    try:
        found = check_run(config, remote_code, draw)
    except BadRows as error:  # here all of them are listed, not the first few
        click.echo(json.dumps([vars(row) for row in error.rows]) if as_json else "\n".join(map(str, error.rows)))
        raise
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in found.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  {item}" for item in value)]
        else:
            lines.append(f"{key}: {value}")
    return lines


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(exists=True, file_okay=False))
@click.option("--data", "rows", required=True, metavar="PATH", help="Labelled rows.")
@_ROOT
@click.option("--json", "as_json", is_flag=True, help="All metrics, as JSON.")
@click.option("--trust-remote-code", "remote_code", metavar="REPO@COMMIT")
def evaluate(run_folder: str, rows: str, root: str | None, as_json: bool, remote_code: str | None) -> None:
    """Metrics of a run's best model on labelled rows."""
    from fasttune.inference import load
    from fasttune.progress import scalars

    metrics = load(run_folder, remote_code=remote_code).evaluate(rows, root=root)
    lines = [f"{name:12} {value:.4f}" for name, value in scalars(metrics).items()]
    click.echo(json.dumps(metrics) if as_json else "\n".join(lines))


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(exists=True, file_okay=False))
@click.option("--data", "rows", metavar="PATH", help="Rows to predict.")
@_ROOT
@click.option("--input", "single", metavar="TEXT|FILE", help="One input: a text, or an image or audio file.")
@click.option("--draw", metavar="DIR", help="Write a picture a row into this new folder, if the task draws any.")
@click.option("--trust-remote-code", "remote_code", metavar="REPO@COMMIT")
def predict(
    run_folder: str,
    rows: str | None,
    root: str | None,
    single: str | None,
    draw: str | None,
    remote_code: str | None,
) -> None:
    """Predictions of a run's best model, as JSON lines in the order of the rows."""
    if (rows is None) == (single is None):
        raise ConfigError("give either --data PATH or --input X")
    from fasttune.inference import load

    model = load(run_folder, remote_code=remote_code)
    given = rows if rows is not None else [{model.task.columns[0].role: single}]
    for prediction in model.predict(given, root=root, draw=draw):
        click.echo(json.dumps(prediction, ensure_ascii=False))


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(exists=True, file_okay=False))
@click.option("--to", "folder", required=True, metavar="DIR", help="A folder that doesn't exist yet.")
def export(run_folder: str, folder: str) -> None:
    """Write a plain transformers folder, LoRA merged, with a model card."""
    from fasttune.inference import load

    load(run_folder).export(folder)
    click.echo(f"model: {folder}")


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True)
def tasks(name: str | None, as_json: bool) -> None:
    """What is installed, and what is broken and why; with NAME, a task's columns and options."""
    from fasttune.listing import describe_task, list_tasks

    found = describe_task(name) if name else list_tasks()
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(found["text"]))


@main.command()
def doctor() -> None:
    """The machine, torch and the kernels: which are compiled, which are used, and why not."""
    from fasttune.doctor import diagnose

    for name, value in diagnose().items():
        click.echo(f"{name:24} {value}")


@main.command()
@click.option("--op", "chosen", metavar="NAME", multiple=True, help="Only this one; repeatable. Default: all.")
@click.option("--json", "file", metavar="FILE", type=click.Path(dir_okay=False), help="Write every figure here.")
def bench(chosen: tuple[str, ...], file: str | None) -> None:
    """The ops and a training step against stock PyTorch, on this machine; takes about a minute."""
    from fasttune.bench import bench as run_bench

    found = run_bench(chosen, click.echo)
    if file is not None:
        Path(file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@main.command()
@click.argument("task", default="text-classification")
@click.option("--output", metavar="DIR", help="Keep the run folders here.")
def demo(task: str, output: str | None) -> None:
    """Train a task's embedded model on its embedded data, offline, by every strategy."""
    from fasttune.demo import run_demo
    from fasttune.memory import keep_pages

    keep_pages()
    run_demo(task, output, click.echo)


@main.command()
@click.argument("path", default="run.yaml", type=click.Path(dir_okay=False))
@click.option("--task", default="text-classification", help="The task the file is for.")
def init(path: str, task: str) -> None:
    """Write a commented run file to start from."""
    from fasttune.listing import run_file_template

    if Path(path).exists():
        raise ConfigError(f"{path}: exists already")
    Path(path).write_text(run_file_template(task), encoding="utf-8")
    click.echo(f"wrote {path}; then: fasttune check {path} && fasttune run {path}")
