"""What the benchmarks of whole runs share: contenders in processes of their own, their steps, tables and bars.

A benchmark is a script whose child process reads a JSON file of settings (`--spec FILE`), trains one contender,
and writes result.json into its folder.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

# The parent imports nothing heavy: on Linux ru_maxrss of a new process starts at the resident set of its parent.

TRAINED = "trained"  # a file that says that training is over: what comes then is not measured
SAMPLED = 2.0  # seconds between looks at memory, each of which holds a process up for about 20 ms a GB
WARM_UP = 5  # steps left out of every contender's rates
LAST = 20  # steps over which the final train loss is averaged
LORA_DROPOUT, WEIGHT_DECAY, CLIP = 0.05, 0.01, 1.0
TRAINER: dict[str, Any] = {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear", "use_cpu": True}
TRAINER |= {"train_sampling_strategy": "group_by_length", "dataloader_pin_memory": False, "disable_tqdm": True}
TRAINER |= {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
TRAIN_LOSS = (f"train loss, last {LAST} steps", "{:.4f}")

Steps = list[dict[str, Any]]
"""rows, loss and what else a benchmark counts; seconds, from the end of the step before to its own."""
Trained = tuple[Steps, Path, int]
"""The steps; the folder of the saved model or adapter; the largest resident set until then, in bytes."""
Measures = Mapping[str, tuple[str, str]]
"""What a table calls a figure of result.json, and how it writes it."""
Results = dict[str, list[dict[str, Any]]]
"""By contender, the result of every run."""


def read(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def machine() -> str:
    """Which machine and versions the figures belong to, and when."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "CPU")
    versions = [f"{name} {metadata.version(name)}" for name in ("fasttune", "torch", "transformers", "peft")]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{time.strftime('%Y-%m-%d %H:%M')}, {name}, {cores} cores, load {load:.1f}; {', '.join(versions)}"


def train_fasttune(spec: Namespace, *, train: dict[str, Any], **settings: Any) -> Trained:
    """`finetune` with the settings and what every contender shares."""
    from fasttune.memory import keep_pages
    from fasttune.run import finetune

    keep_pages()  # as `fasttune run` does
    lora = {"rank": spec.rank, "alpha": 2 * spec.rank, "dropout": LORA_DROPOUT} if spec.strategy == "lora" else {}
    shared = {key: getattr(spec, key) for key in ("steps", "batch", "lr", "seed")}
    optimizer = {"optimizer": {"kind": "adamw", "weight_decay": WEIGHT_DECAY}, "head_lr": spec.lr, "clip": CLIP}
    report = finetune(
        strategy={"kind": spec.strategy, **lora},
        train={**shared, **optimizer, **train},
        output=str(Path(spec.folder) / "run"),
        quiet=True,
        **settings,
    )
    records = [record for record in read(report.folder / "metrics.jsonl") if "metrics" not in record]
    # A step's own seconds leave out what the loop does between steps (logging); the run's seconds hold it.
    between = (report.metrics["seconds"] - sum(record["seconds"] for record in records)) / len(records)
    steps = [record | {"seconds": record["seconds"] + between} for record in records]
    return steps, report.folder / "last", records[-1]["peak_memory_bytes"]


def train_watched(
    spec: Namespace, base: type, count: Callable[[Any], dict[str, int]], **arguments: Any
) -> Trained:
    """Trains by a Trainer class of transformers or derived from it.

    count: what a step's record holds of a batch; the micro-batches of a step are summed.
    """
    from transformers import TrainerCallback

    steps: Steps = []
    calls: Steps = []

    class Watched(base):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            found = count(inputs)
            loss = super().training_step(model, inputs, num_items_in_batch)
            calls.append({**found, "loss": float(loss)})
            return loss

    class Clock(TrainerCallback):
        ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            whole = {key: sum(call[key] for call in calls) for key in calls[0]}
            steps.append(whole | {"seconds": now - self.ended})
            calls.clear()
            self.ended = now

    trainer: Any = Watched(callbacks=[Clock()], **arguments)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    saved = Path(spec.folder) / "saved"
    trainer.save_model(str(saved))
    return steps, saved, peak


def trainer_settings(spec: Namespace, dtype: str, warmup: int) -> dict[str, Any]:
    """Arguments of TrainingArguments that every contender shares with fasttune's run."""
    sizes = {"max_steps": spec.steps, "per_device_train_batch_size": spec.batch, "seed": spec.seed}
    rates = {"learning_rate": spec.lr, "warmup_steps": warmup, "weight_decay": WEIGHT_DECAY}
    return {**sizes, **rates, "max_grad_norm": CLIP, "bf16": "autocast" in dtype, **TRAINER}


def adapted(spec: Namespace, model: Any, dtype: str, task_type: str, **layers: Any) -> Any:
    """The model as a user of Trainer would make it: with strategy lora, PEFT's on every linear layer; with types
    "bf16-autocast", what is trained in fp32 (PEFT keeps its matrices so, but not a head)."""
    from peft import LoraConfig, get_peft_model

    if spec.strategy == "lora":
        sizes: dict[str, Any] = {"r": spec.rank, "lora_alpha": 2 * spec.rank, "lora_dropout": LORA_DROPOUT}
        config = LoraConfig(task_type=task_type, target_modules="all-linear", **sizes, **layers)
        model = get_peft_model(model, config)
    if dtype == "bf16-autocast":
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
    return model


def open_saved(auto: Any, base: str, saved: Path, **arguments: Any) -> Any:
    """What a contender saved, opened by transformers, and by PEFT if it is an adapter: in fp32, in eval mode."""
    import torch
    from peft import PeftModel

    adapter = (saved / "adapter_config.json").exists()
    model: Any = auto.from_pretrained(base if adapter else saved, dtype=torch.float32, **arguments)
    return (PeftModel.from_pretrained(model, str(saved)) if adapter else model).eval()


def write_result(spec: Namespace, trained: Trained, figures: dict[str, Any], score: Callable[[Path], Any]) -> None:
    """result.json: what all measure, the benchmark's own figures, and its score of what was saved."""
    Path(spec.folder, TRAINED).touch()
    steps, saved, peak = trained
    kept = steps[WARM_UP:]
    result = {
        "rows_per_s": sum(step["rows"] for step in kept) / sum(step["seconds"] for step in kept),
        "peak_mb": peak / 1e6,
        "train_loss": fmean(step["loss"] for step in steps[-LAST:]),
        "train_s": sum(step["seconds"] for step in steps),
        "process_s": time.time() - spec.started,
        **figures,
        **score(saved),
    }
    Path(spec.folder, "result.json").write_text(json.dumps(result), encoding="utf-8")


def measure(
    script: str, settings: dict[str, Any], measures: Measures, contender: str, title: str, keep_pages: bool
) -> dict[str, Any]:
    """One contender, once, in a process of its own; prints what came out."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder, "spec.json")
        record = settings | {"contender": contender, "folder": folder, "started": time.time()}
        path.write_text(json.dumps(record), encoding="utf-8")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (KEEP_PAGES if keep_pages else {})
        child = [sys.executable, script, "--spec", str(path)]
        process = subprocess.Popen(
            child, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        peak, errors = 0, None
        while errors is None:
            if not Path(folder, TRAINED).exists():
                peak = max(peak, resident(process.pid))
            with suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=SAMPLED)
        if process.returncode:
            sys.exit(f"{contender} failed with status {process.returncode}:\n{errors[-4000:]}")
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
        result["peak_tree_mb"] = peak / 1e6
    figures = (f"{name} {form.format(result[key])}" for key, (name, form) in measures.items())
    print(title, *figures, sep=", ", flush=True)
    return result


def resident(pid: int) -> int:
    """Bytes of memory of a process and all below it, what they share counted once (PSS); 0 if it has ended."""
    try:
        found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = int(found[1]) * 1024 if found else 0
    return own + sum(resident(int(child)) for child in children)


def medians(results: Results, measures: Measures) -> dict[str, dict[str, float]]:
    return {name: {key: median(run[key] for run in runs) for key in measures} for name, runs in results.items()}


def rival(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The fastest contender that is not the first, fasttune."""
    return max(list(found.values())[1:], key=lambda figures: figures["rows_per_s"])


def print_table(results: Results, measures: Measures) -> None:
    """Medians, the range behind them, and the first contender's share of the fastest other's."""
    found = medians(results, measures)
    print(f"\n| median of {len(next(iter(results.values())))} (range) | {' | '.join(results)} | ratio |")
    print("|---" * (len(results) + 2) + "|")
    for key, (name, form) in measures.items():
        values = [[run[key] for run in runs] for runs in results.values()]
        cells = [f"{form} ({form} to {form})".format(median(runs), min(runs), max(runs)) for runs in values]
        ratio = f"{median(values[0]) / rival(found)[key]:.2f}" if len(found) > 1 and rival(found)[key] else ""
        print(f"| {name} | {' | '.join(cells)} | {ratio} |")


def print_checks(checks: Mapping[str, bool]) -> bool:
    print("", *(f"{'pass' if passed else 'FAIL'}: {check}" for check, passed in checks.items()), sep="\n")
    return all(checks.values())
