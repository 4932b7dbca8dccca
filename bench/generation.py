"""Text generation against transformers' Trainer + PEFT (TRL too, for chat), on a CPU: supervised tokens/s, memory.

python bench/generation.py --train train.jsonl --valid valid.jsonl --model seq2seq --vocabulary 131072 --check

A small encoder-decoder or decoder of random weights, with a tokenizer made from the rows of train; the same rows
and settings for each contender, in turn, each in a process of its own. bench/README.md says what it all means.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from itertools import product
from pathlib import Path
from statistics import fmean
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
    rival,
    train_fasttune,
    train_watched,
    trainer_settings,
    write,
    write_result,
)
from contenders import measure as measure_child

LEAST_SPEED, MOST_MEMORY = 2.0, 0.5  # the bars, as shares of the fastest other contender's
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
    "train_loss": TRAIN_LOSS,
    "process_s": ("whole process, s", "{:.1f}"),
}
DTYPES, ATTENTION, PARTS = ("bf16-autocast", "bf16", "autocast"), ("sdpa", "eager"), (2, 4, 8)


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


def train_ours(spec: Namespace) -> Trained:
    task, options, columns, shown = "summarization", {"max_source_length": spec.max_length}, {}, {}
    data = {"train": spec.train, "valid": spec.valid}
    if spec.model == "chat":
        task, options = "text-generation", {"max_length": spec.max_length}
        for split, path in data.items():
            rows = ({"messages": messages_of(row)} for row in read(path))
            data[split] = write(Path(spec.folder, f"{split}.jsonl"), rows)
    else:
        columns = {"document": "description", "summary": "synopsis"}
        shown = {"prefix": ""} if spec.model == "seq2seq" else {"prompt": PROMPT}
        options["max_target_length"] = spec.max_target
    return train_fasttune(
        spec,
        task=task,
        model=spec.source,
        options=options | shown,
        data={**data, "columns": columns},
        train={"schedule": {"kind": "linear", "warmup": 1}},
        eval={"every": spec.steps, "max_rows": 1, "samples": 0},
    )


def train_other(spec: Namespace) -> Trained:
    """transformers' Trainer (Seq2SeqTrainer's training loop is the same), or TRL's SFTTrainer."""
    import datasets
    import torch
    import transformers as hf

    hf.set_seed(spec.seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(spec.source)
    auto = hf.AutoModelForSeq2SeqLM if spec.model == "seq2seq" else hf.AutoModelForCausalLM
    dtype = torch.bfloat16 if spec.dtype.startswith("bf16") else torch.float32
    model: Any = auto.from_pretrained(spec.source, dtype=dtype, attn_implementation=spec.attn)
    model = adapted(spec, model, spec.dtype, "SEQ_2_SEQ_LM" if spec.model == "seq2seq" else "CAUSAL_LM")
    settings = trainer_settings(spec, spec.dtype, warmup=1)
    settings["per_device_train_batch_size"] //= spec.parts
    settings |= {"gradient_accumulation_steps": spec.parts, "output_dir": str(Path(spec.folder) / "trainer")}
    base: Any = hf.Trainer
    if spec.contender == "trl":
        import trl

        base = trl.SFTTrainer
        asked = {"max_length": spec.max_length, "assistant_only_loss": True, "gradient_checkpointing": False}
        rows = [{"messages": messages_of(row)} for row in read(spec.train)]
        arguments = {"args": trl.SFTConfig(**asked, **settings), "processing_class": tokenizer}
    else:
        rows = [encode(spec, tokenizer, row) for row in read(spec.train)]
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        collator = hf.DataCollatorForSeq2Seq(tokenizer, model if spec.model == "seq2seq" else None)
        arguments = {"args": hf.TrainingArguments(**settings), "data_collator": collator}
    return train_watched(
        spec,
        base,
        lambda inputs: {"rows": len(inputs["input_ids"])},
        model=model,
        train_dataset=datasets.Dataset.from_list(rows),
        **arguments,
    )


def score(spec: Namespace, saved: Path) -> dict[str, Any]:
    """Validation loss a supervised token, of what a contender saved, opened by transformers and PEFT, in fp32."""
    import torch
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(spec.source)
    auto = hf.AutoModelForSeq2SeqLM if spec.model == "seq2seq" else hf.AutoModelForCausalLM
    model = open_saved(auto, spec.source, saved)
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
    trained = train_ours(spec) if spec.contender == "fasttune" else train_other(spec)
    steps = trained[0][WARM_UP:]
    # Contenders cut batches from one set of rows: what is supervised in a row is the same for all on average.
    supervised = sum(step["rows"] for step in steps) * spec.supervised_a_row
    figures = {"supervised_per_s": supervised / sum(step["seconds"] for step in steps)}
    write_result(spec, trained, figures, lambda saved: score(spec, saved))


def measure(args: Namespace, contender: str, title: str, **settings: Any) -> dict[str, Any]:
    return measure_child(__file__, vars(args) | settings, MEASURES, contender, title, contender != "fasttune")


def tune(args: Namespace, contender: str) -> dict[str, Any]:
    """The settings of a contender that take the most rows/s on a few steps: types and attention first, then
    micro-batches."""
    found: list[tuple[float, dict[str, Any]]] = []

    def best_of(settings: list[dict[str, Any]]) -> dict[str, Any]:
        for setting in settings:
            title = f"trying {contender}, {', '.join(f'{key} {value}' for key, value in setting.items())}"
            result = measure(args, contender, title, **setting, seed=0, steps=args.tune_steps)
            found.append((result["rows_per_s"], setting))
        return max(found, key=lambda pair: pair[0])[1]

    best = best_of([{"dtype": dtype, "attn": attn, "parts": 1} for dtype, attn in product(DTYPES, ATTENTION)])
    return best_of([best | {"parts": parts} for parts in PARTS if args.batch % parts == 0])


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--train", metavar="JSONL", required=True)
    add("--valid", metavar="JSONL", required=True)
    add("--model", choices=("seq2seq", "decoder", "chat"), default="seq2seq")
    numbers: dict[str, Any] = {"--steps": 40, "--batch": 16, "--rank": 16, "--max-length": 256, "--max-target": 48}
    numbers |= {"--vocabulary": 131072, "--lr": 1e-3, "--scored": 200, "--tune-steps": 8}
    for name, value in numbers.items():
        add(name, type=type(value), default=value, help=f"default: {value}")
    add("--strategy", choices=("full", "lora"), default="lora")
    add("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    add("--json", metavar="FILE", help="write every figure here")
    add("--check", action="store_true", help="exit with 1 if fasttune misses a bar")
    args = parser.parse_args()
    if min(args.steps, args.tune_steps) <= WARM_UP:
        parser.error(f"the first {WARM_UP} steps are not measured: give more")
    return args


def compare(args: Namespace) -> int:
    print(where := machine())
    contenders = ["fasttune", "trainer", *(["trl"] if args.model == "chat" else [])]
    results: Results = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        args.source = str(Path(folder, "model"))
        make_model(args, Path(args.source))
        args.train, args.valid = (
            cut(args, split, folder, most)
            for split, most in (("train", args.steps * args.batch), ("valid", args.scored))
        )
        args.supervised_a_row = supervised_a_row(args)
        chosen = {name: tune(args, name) if name != "fasttune" else {} for name in contenders}
        print(f"{args.model}, {args.strategy}, vocabulary {args.vocabulary}; {chosen}; pages kept by all")
        for turn, seed in enumerate(args.seeds):
            for contender in contenders[:: -1 if turn % 2 else 1]:
                title = f"seed {seed}, {contender}"
                results[contender].append(measure(args, contender, title, seed=seed, **chosen[contender]))
    if len({json.dumps(run.pop("same")) for runs in results.values() for run in runs}) > 1:
        sys.exit("the contenders did not train the same: adapted layers differ")
    print_table(results, MEASURES)
    passed = passes(medians(results, MEASURES))
    if args.json:
        report = {"machine": where, "arguments": vars(args), "chosen": chosen, "results": results}
        Path(args.json).write_text(json.dumps({**report, "passed": passed}, indent=2), encoding="utf-8")
    return 1 if args.check and not passed else 0


def passes(found: dict[str, dict[str, float]]) -> bool:
    ours, best = found["fasttune"], rival(found)
    speed, memory = (ours[key] / best[key] for key in ("supervised_per_s", "peak_mb"))
    loss = ours["valid_loss"] - best["valid_loss"]
    return print_checks(
        {
            f"supervised tokens/s at least {LEAST_SPEED} x: {speed:.2f}": speed >= LEAST_SPEED,
            f"peak memory at most {MOST_MEMORY} x: {memory:.2f}": memory <= MOST_MEMORY,
            f"validation loss no worse than by 1 %: {loss:+.4f}": loss <= 0.01 * best["valid_loss"],
        }
    )


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
    return write(Path(folder, f"{split}.jsonl"), found)


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
