"""Text generation against transformers' Trainer + PEFT (TRL too, for chat), on a CPU: supervised tokens/s, memory.

python bench/generation.py --train train.jsonl --valid valid.jsonl --model seq2seq --vocabulary 131072 --check

A small encoder-decoder or decoder of random weights, with a tokenizer made from the rows of train; the same rows
and settings for each contender, in turn, each in a process of its own. bench/README.md says what it all means.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from train import CLIP, KEEP_PAGES, LORA_DROPOUT, TRAINER, WARM_UP, WEIGHT_DECAY, Steps, machine, read

LEAST_SPEED, MOST_MEMORY = 2.0, 0.5  # the bars, as shares of the fastest other contender's
LAST = 20
PROMPT = "Summarize:\n{document}\nSummary: "
SPECIAL = ("<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MEASURES = {
    "supervised_per_s": ("supervised tokens/s", "{:.0f}"),
    "rows_per_s": ("rows/s", "{:.1f}"),
    "peak_mb": ("peak memory, MB", "{:.0f}"),
    "valid_loss": ("validation loss a token", "{:.4f}"),
    "train_loss": (f"train loss, last {LAST} steps", "{:.4f}"),
    "process_s": ("whole process, s", "{:.1f}"),
}
DTYPES = ("bf16-autocast", "bf16", "autocast")


def make_model(spec: Namespace, folder: Path) -> None:
    """A tokenizer from the rows of train, and a model of random weights for its kind."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = (row[key] for row in read(spec.train) for key in ("description", "synopsis"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16384, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    if spec.model == "seq2seq":
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    end = "<|im_end|>" if spec.model == "chat" else "</s>"
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=end, unk_token="<unk>", model_max_length=1024
    )
    if spec.model == "chat":
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    ids = dict(pad_token_id=0, eos_token_id=tokenizer.eos_token_id, vocab_size=spec.vocabulary)
    config: Any
    if spec.model == "seq2seq":
        sizes = dict(d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_decoder_layers=4, num_heads=8)
        config = hf.T5Config(**sizes, **ids, decoder_start_token_id=0, dropout_rate=0.1, tie_word_embeddings=True)
        hf.T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8)
        config = hf.LlamaConfig(**sizes, **ids, max_position_embeddings=1024, tie_word_embeddings=True)
        hf.LlamaForCausalLM(config).save_pretrained(folder)


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    question = {"role": "user", "content": "Summarize:\n" + row["description"]}
    return [question, {"role": "assistant", "content": row["synopsis"]}]


def encode(spec: Namespace, tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """input_ids and labels as every contender has them: the document cut, never the summary."""
    if spec.model == "chat":
        found = tokenizer.apply_chat_template(
            messages_of(row), return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        ids, mask = found["input_ids"][: spec.max_length], found["assistant_masks"][: spec.max_length]
        labels = [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}
    target = tokenizer(row["synopsis"], add_special_tokens=False)["input_ids"][: spec.max_target - 1]
    target = [*target, tokenizer.eos_token_id]
    if spec.model == "seq2seq":
        ids = tokenizer(row["description"], truncation=True, max_length=spec.max_length)["input_ids"]
        return {"input_ids": ids, "labels": target}
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in PROMPT.split("{document}"))
    document = tokenizer(row["description"], add_special_tokens=False)["input_ids"]
    prompt = [*before, *document[: spec.max_length - len(before) - len(after) - len(target)], *after]
    return {"input_ids": [*prompt, *target], "labels": [-100] * len(prompt) + target}


def train_fasttune(spec: Namespace) -> tuple[Steps, Path, int]:
    from fasttune.memory import keep_pages
    from fasttune.run import finetune

    keep_pages()  # as `fasttune run` does
    lora = {"rank": spec.rank, "alpha": 2 * spec.rank, "dropout": LORA_DROPOUT} if spec.strategy == "lora" else {}
    shared = {key: getattr(spec, key) for key in ("steps", "batch", "lr", "seed")}
    options: dict[str, Any]
    if spec.model == "chat":
        task, columns, options = "text-generation", {}, {"max_length": spec.max_length}
    else:
        task, columns = "summarization", {"document": "description", "summary": "synopsis"}
        options = {"max_source_length": spec.max_length, "max_target_length": spec.max_target, "prefix": ""}
        if spec.model == "decoder":
            options = {**options, "prompt": PROMPT}
            del options["prefix"]
    data: dict[str, Any] = {"train": spec.train, "valid": spec.valid, "columns": columns}
    if spec.model == "chat":
        for split in ("train", "valid"):
            path = Path(spec.folder, f"{split}.jsonl")
            rows = ({"messages": messages_of(row)} for row in read(data[split]))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            data[split] = str(path)
    report = finetune(
        task=task,
        model=spec.source,
        options=options,
        data=data,
        strategy={"kind": spec.strategy, **lora},
        train={
            **shared,
            "optimizer": {"kind": "adamw", "weight_decay": WEIGHT_DECAY},
            "head_lr": spec.lr,
            "clip": CLIP,
            "schedule": {"kind": "linear", "warmup": 1},
        },
        eval={"every": spec.steps, "max_rows": 1, "samples": 0},
        output=str(Path(spec.folder) / "run"),
        quiet=True,
    )
    records = [record for record in read(report.folder / "metrics.jsonl") if "metrics" not in record]
    between = (report.metrics["seconds"] - sum(record["seconds"] for record in records)) / len(records)
    steps = [record | {"seconds": record["seconds"] + between} for record in records]
    return steps, report.folder / "last", records[-1]["peak_memory_bytes"]


def train_other(spec: Namespace) -> tuple[Steps, Path, int]:
    """transformers' Trainer (Seq2SeqTrainer's training loop is the same), or TRL's SFTTrainer."""
    import datasets
    import torch
    import transformers as hf

    hf.set_seed(spec.seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(spec.source)
    auto = hf.AutoModelForSeq2SeqLM if spec.model == "seq2seq" else hf.AutoModelForCausalLM
    dtype = torch.bfloat16 if spec.dtype.startswith("bf16") else torch.float32
    model: Any = auto.from_pretrained(spec.source, dtype=dtype, attn_implementation=spec.attn)
    peft_config = None
    if spec.strategy == "lora":
        from peft import LoraConfig, get_peft_model

        kind = "SEQ_2_SEQ_LM" if spec.model == "seq2seq" else "CAUSAL_LM"
        sizes: dict[str, Any] = {"r": spec.rank, "lora_alpha": 2 * spec.rank, "lora_dropout": LORA_DROPOUT}
        peft_config = LoraConfig(task_type=kind, target_modules="all-linear", **sizes)
        if spec.contender == "trainer":
            model = get_peft_model(model, peft_config)
    if spec.dtype == "bf16-autocast":
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
    rows = [{**row} for row in read(spec.train)]
    times: list[float] = []
    losses: list[float] = []

    class Clock(hf.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        on_train_begin = on_step_end

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    settings: dict[str, Any] = {
        "max_steps": spec.steps,
        "per_device_train_batch_size": spec.batch,
        "seed": spec.seed,
        "learning_rate": spec.lr,
        "warmup_steps": 1,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "bf16": "autocast" in spec.dtype,
        **TRAINER,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    output = str(Path(spec.folder) / "trainer")
    counts: list[tuple[int, int]] = []
    if spec.contender == "trl":
        import trl

        class Own(trl.SFTTrainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                counts.append((len(inputs["input_ids"]), int((inputs["labels"] != -100).sum())))
                return super().training_step(model, inputs, num_items_in_batch)

        trainer: Any = Own(
            model=model,
            args=trl.SFTConfig(
                output, max_length=spec.max_length, assistant_only_loss=True, packing=False, **settings
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": messages_of(row)} for row in rows]),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[Clock()],
        )
    else:

        class Counted(hf.Trainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                counts.append((len(inputs["input_ids"]), int((inputs["labels"] != -100).sum())))
                return super().training_step(model, inputs, num_items_in_batch)

        encoded = [encode(spec, tokenizer, row) for row in rows]
        encoded = [{**one, "attention_mask": [1] * len(one["input_ids"])} for one in encoded]
        trainer = Counted(
            model=model,
            args=hf.TrainingArguments(output, **settings),
            train_dataset=datasets.Dataset.from_list(encoded),
            data_collator=hf.DataCollatorForSeq2Seq(tokenizer, model if spec.model == "seq2seq" else None),
            callbacks=[Clock()],
        )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    saved = Path(spec.folder) / "saved"
    trainer.save_model(str(saved))
    seconds = [end - before for before, end in pairwise(times)]
    steps = [
        {"rows": rows, "supervised": supervised, "seconds": s, "loss": loss}
        for (rows, supervised), s, loss in zip(counts, seconds, losses, strict=True)
    ]
    return steps, saved, peak


def score(spec: Namespace, saved: Path) -> dict[str, Any]:
    """Validation loss a supervised token, of what a contender saved, opened by transformers and PEFT, in fp32."""
    import torch
    import transformers as hf
    from peft import PeftModel

    tokenizer = hf.AutoTokenizer.from_pretrained(spec.source)
    auto = hf.AutoModelForSeq2SeqLM if spec.model == "seq2seq" else hf.AutoModelForCausalLM
    adapter = (saved / "adapter_config.json").exists()
    model: Any = auto.from_pretrained(spec.source if adapter else saved, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, str(saved)) if adapter else model).eval()
    total, count = 0.0, 0
    for row in read(spec.valid):
        one = {name: torch.tensor([ids]) for name, ids in encode(spec, tokenizer, row).items()}
        labels = one.pop("labels")
        with torch.inference_mode():
            loss = model(**one, labels=labels).loss
        kept = int((labels[:, 0 if spec.model == "seq2seq" else 1 :] != -100).sum())
        total, count = total + float(loss) * kept, count + kept
    trained = {name: weight.numel() for name, weight in model.named_parameters() if "lora_" in name}
    return {"valid_loss": total / count, "same": sorted(trained.items())}


def contend(spec: Namespace) -> None:
    """The child process: trains, takes the figures, only then scores, and writes the result."""
    steps, saved, peak = train_fasttune(spec) if spec.contender == "fasttune" else train_other(spec)
    kept = steps[WARM_UP:]
    seconds = sum(step["seconds"] for step in kept)
    rows = sum(step["rows"] for step in kept)
    result = {
        "rows_per_s": rows / seconds,
        # Contenders cut batches from one set of rows: what is supervised in a row is the same for all on average.
        "supervised_per_s": rows / seconds * spec.supervised_a_row,
        "peak_mb": peak / 1e6,
        "train_loss": fmean(step["loss"] for step in steps[-LAST:]),
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
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | ({} if contender == "fasttune" else KEEP_PAGES)
        child = [sys.executable, __file__, "--spec", str(path)]
        done = subprocess.run(child, env=environment, text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"{contender} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    print(
        title,
        *(f"{name} {form.format(result[key])}" for key, (name, form) in MEASURES.items()),
        sep=", ",
        flush=True,
    )
    return result


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--train", metavar="JSONL", required=True)
    add("--valid", metavar="JSONL", required=True)
    add("--model", choices=("seq2seq", "decoder", "chat"), default="seq2seq")
    numbers: dict[str, Any] = {"--steps": 60, "--batch": 32, "--rank": 16, "--max-length": 256, "--max-target": 48}
    numbers |= {"--vocabulary": 131072, "--lr": 1e-3, "--scored": 200, "--tune-steps": 10}
    for name, value in numbers.items():
        add(name, type=type(value), default=value, help=f"default: {value}")
    add("--strategy", choices=("full", "lora"), default="lora")
    add("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    add("--check", action="store_true", help="exit with 1 if fasttune misses a bar")
    args = parser.parse_args()
    if min(args.steps, args.tune_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not measured: give more")
    return args


def compare(args: Namespace) -> int:
    print(machine())
    contenders = ["fasttune", "trainer", *(["trl"] if args.model == "chat" else [])]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        args.source = str(Path(folder, "model"))
        make_model(args, Path(args.source))
        args.train, args.valid = (
            cut(args, split, folder, most)
            for split, most in (("train", args.steps * args.batch), ("valid", args.scored))
        )
        args.supervised_a_row = supervised_a_row(args)
        tried = {}
        for dtype, attn in product(DTYPES, ("sdpa", "eager")):
            found = measure(
                args, "trainer", f"trying {dtype}, {attn}", dtype=dtype, attn=attn, seed=0, steps=args.tune_steps
            )
            tried[dtype, attn] = found["rows_per_s"]
        dtype, attn = max(tried, key=tried.__getitem__)
        print(
            f"{args.model}, {args.strategy}, vocabulary {args.vocabulary}; the others: {dtype}, {attn}, pages kept"
        )
        for turn, seed in enumerate(args.seeds):
            for contender in contenders[:: -1 if turn % 2 else 1]:
                title = f"seed {seed}, {contender}"
                results[contender].append(measure(args, contender, title, dtype=dtype, attn=attn, seed=seed))
    if len({json.dumps(run["same"]) for runs in results.values() for run in runs}) > 1:
        print("note: the contenders' adapters differ")
    medians = {name: {key: median(run[key] for run in runs) for key in MEASURES} for name, runs in results.items()}
    print(f"\n| median of {len(args.seeds)} (range) | {' | '.join(results)} |\n{'|---' * (len(results) + 1)}|")
    for key, (name, form) in MEASURES.items():
        cells = [
            f"{form} ({form} to {form})".format(median(found), min(found), max(found))
            for found in ([run[key] for run in runs] for runs in results.values())
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    return 0 if passes(medians) or not args.check else 1


def passes(medians: dict[str, dict[str, float]]) -> bool:
    ours = medians.pop("fasttune")
    best = max(medians.values(), key=lambda found: found["rows_per_s"])
    speed, memory = (ours[key] / best[key] for key in ("supervised_per_s", "peak_mb"))
    loss = ours["valid_loss"] - best["valid_loss"]
    checks = {
        f"supervised tokens/s at least {LEAST_SPEED} x: {speed:.2f}": speed >= LEAST_SPEED,
        f"peak memory at most {MOST_MEMORY} x: {memory:.2f}": memory <= MOST_MEMORY,
        f"validation loss no worse than by 1 %: {loss:+.4f}": loss <= 0.01 * best["valid_loss"],
    }
    print("", *(f"{'pass' if passed else 'FAIL'}: {check}" for check, passed in checks.items()), sep="\n")
    return all(checks.values())


def cut(args: Namespace, split: str, folder: str, most: int) -> str:
    """A file of the first rows of a split; for chat, of those that fit whole, so that all learn the same."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(args.source)
    found: list[dict[str, Any]] = []
    for row in read(getattr(args, split)):
        if len(found) < most and (
            args.model != "chat" or len(encode(args, tokenizer, row)["labels"]) < args.max_length
        ):
            found.append(row)
    target = Path(folder, f"{split}.jsonl")
    target.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(target)


def supervised_a_row(args: Namespace) -> float:
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(args.source)
    return fmean(
        sum(label != -100 for label in encode(args, tokenizer, row)["labels"]) for row in read(args.train)
    )


if __name__ == "__main__":
    if "--spec" not in sys.argv:
        sys.exit(compare(parse()))
    contend(Namespace(**json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))))
