"""What the scripts share that pretrain the demos' small models: docstrings, a tokenizer, a run, a model card.

Nothing is downloaded, and none of the sources is imported.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

import fasttune
from fasttune.demo import write_rows
from fasttune.docstrings import Docstring, docstrings, files, roots
from fasttune.memory import keep_pages

VALID = 500  # rows kept to tell how well the model does
LEAST = 30  # characters of a docstring

Row = dict[str, Any]

CARD = """\
---
license: apache-2.0
library_name: transformers
{tag}
---

# {title}

{what} {parameters:,} parameters.
It serves fasttune's demo where no hub is reachable, and knows little beyond {domain}.

## How it was made

    {command}

- Data: {data}
- Objective: {objective}
- Training, by fasttune: {steps:,} steps of {batch} out of {rows:,} rows in {minutes} minutes on {threads} CPU
  thread(s), bfloat16 with float32 master weights, AdamW, peak learning rate {lr}.
- On {valid} rows left out: {metrics}.

## Licence

The weights are released under Apache-2.0. {licence}
"""
DATA = """\
{docstrings:,} docstrings of the standard library and {packages} installed packages ({characters:,}
  characters, exact repeats dropped), without those whose first paragraph is on the demos' held-out side
  ({held_out:,} of them). Text and vocabulary change with the installed versions. Nothing was downloaded."""
LICENCE = """\
The training text is documentation of open-source packages (Apache-2.0,
BSD, MIT, PSF and similar licences); none of it is contained here."""


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """With the options that every script has; `pretrain` writes them into the card."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--out", type=Path, required=True, help="model folder to write")
    found.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--seed", type=int, default=0)
    return found


def arguments(description: str, steps: int) -> argparse.Namespace:
    """Of a script that reads docstrings."""
    found = parser(description, steps)
    found.add_argument("--texts", type=int, default=0, help="read so many docstrings at most; for a quick try")
    return found.parse_args()


def read_docstrings(seed: int, most: int = 0) -> tuple[list[Docstring], dict[str, str]]:
    """Every docstring of what is installed once, in an order drawn by the seed, but those held out; and what the
    card says of them."""
    found: dict[str, Docstring] = {}
    packages, held_out = set(), 0
    for name, root in roots(everything=True).items():
        for path in files(root):
            for docstring in docstrings(path):
                if docstring.is_held_out:
                    held_out += 1
                elif len(docstring.text) >= LEAST:
                    found.setdefault(docstring.text, docstring)
                    packages.add(name)
    texts = list(found.values())
    random.Random(seed).shuffle(texts)
    texts = texts[: most or None]
    characters = sum(len(docstring.text) for docstring in texts)
    counts = {"docstrings": len(texts), "packages": len(packages - {"python"}), "characters": characters}
    data = DATA.format(**counts, held_out=held_out)
    domain = "the documentation of Python packages"
    return texts, {"tag": "language: en", "domain": domain, "data": data, "licence": LICENCE}


def train_tokenizer(texts: Iterable[str], size: int, special: Sequence[str], *, flat: bool) -> Tokenizer:
    """A byte-level BPE. flat: without letters' case and layout: a small model has no tokens to spare for them."""
    tokenizer = Tokenizer(models.BPE())
    if flat:
        layout = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *layout])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[_.]+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=flat)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_start(
    folder: Path, config: PreTrainedConfig, tokenizer: Tokenizer, ids: Mapping[str, int], **names: Any
) -> None:
    """What `pretrain` starts from where weights are random and text is written: configuration, tokenizer.

    ids: of the tokens that generation needs. names: of the special tokens, for the tokenizer.
    """
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, model_max_length=512, **names
    ).save_pretrained(folder)


def pretrain(
    options: argparse.Namespace,
    *,
    task: str,
    model: Path,
    auto: Any,
    rows: list[Row],
    settings: Mapping[str, Any],
    train: Mapping[str, Any],
    card: Mapping[str, Any],
    processor: Sequence[str] = ("tokenizer.json", "tokenizer_config.json"),
    metrics: Sequence[str] = (),
) -> None:
    """Trains every weight on the rows and writes the model's folder: weights in bfloat16, processor, card.

    model: folder of the processor and a configuration, or of a model to go on with. auto: the class that opens it.
    settings: further keys of `fasttune.finetune`. card: what CARD names and is not known here. processor: its
    files. metrics: those that the card tells; all numbers if there is none.
    """
    keep_pages()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        data = {}
        for split, part in {"valid": rows[:VALID], "train": rows[VALID:]}.items():
            path = Path(scratch, f"{split}.jsonl")
            write_rows(path, part)
            data[split] = str(path)
        report = fasttune.finetune(
            task=task,
            model=str(model),
            data=data,
            strategy={"kind": "full"},
            train={"steps": options.steps, "seed": options.seed, "head_lr": train["lr"], **train},
            output=str(Path(scratch, "run")),
            **settings,
        )
        best = Path(scratch, "run", "last")
        trained = auto.from_pretrained(best, dtype=torch.bfloat16)
        trained.save_pretrained(options.out)
        for name in processor:  # not the run's, which has its limits of length and size
            shutil.copy(model / name, options.out / name)
    if "tokenizer.json" in processor:
        compact(options.out / "tokenizer.json")
    measured = report.metrics["valid"]
    shown = {name: measured[name] for name in metrics or measured if isinstance(measured[name], float)}
    values = {
        **card,
        "command": f"python {sys.argv[0]} --out model --steps {options.steps} --threads {options.threads} "
        f"--seed {options.seed}",
        "parameters": sum(weight.numel() for weight in trained.parameters()),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "metrics": ", ".join(f"{name} {value:.3f}" for name, value in shown.items()),
        "rows": len(rows) - VALID,
        "valid": VALID,
        **vars(options),
        **train,
    }
    (options.out / "README.md").write_text(CARD.format(**values), encoding="utf-8")
    print(json.dumps(shown))


def compact(path: Path) -> None:
    """Saved indented, a tokenizer has twice the size."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(whole, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
