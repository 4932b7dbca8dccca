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
from transformers import PreTrainedTokenizerFast

import fasttune
from fasttune.docstrings import Docstring, docstrings, files, roots
from fasttune.memory import keep_pages

VALID = 500  # rows kept to tell how well the model does
LEAST = 30  # characters of a docstring

Row = dict[str, Any]

CARD = """\
---
license: apache-2.0
library_name: transformers
language: en
---

# {title}

{what} {parameters:,} parameters.
It serves fasttune's demo where no hub is reachable, and knows little beyond the documentation of Python packages.

## How it was made

    {command}

- Data: {docstrings:,} docstrings of the standard library and {packages} installed packages ({characters:,}
  characters, exact repeats dropped), without those whose first paragraph is on the demos' held-out side
  ({held_out:,} of them). Text and vocabulary change with the installed versions. Nothing was downloaded.
- Objective: {objective}
- Training, by fasttune: {steps:,} steps of {batch} out of {rows:,} rows in {minutes} minutes on {threads} CPU
  thread(s), bfloat16 with float32 master weights, AdamW, peak learning rate {lr}.
- On {valid} rows left out: {metrics}.

## Licence

The weights are released under Apache-2.0. The training text is documentation of open-source packages (Apache-2.0,
BSD, MIT, PSF and similar licences); none of it is contained here.
"""


def arguments(description: str, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=steps, help=f"default: {steps}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=0, help="read so many docstrings at most; for a quick try")
    return parser.parse_args()


def read_docstrings(seed: int, most: int = 0) -> tuple[list[Docstring], dict[str, int]]:
    """Every docstring of what is installed once, in an order drawn by the seed, but those held out; and counts of
    them for the card."""
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
    return texts, {**counts, "held_out": held_out}


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


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **names: Any) -> None:
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)


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
) -> None:
    """Trains every weight on the rows and writes the model's folder: weights in bfloat16, tokenizer, card.

    model: folder of the tokenizer and a configuration, or of a model to go on with. auto: the class that opens it.
    settings: further keys of `fasttune.finetune`. card: title, what, objective and the counts of the docstrings.
    """
    keep_pages()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        data = {}
        for split, part in {"valid": rows[:VALID], "train": rows[VALID:]}.items():
            path = Path(scratch, f"{split}.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
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
        for name in ("tokenizer.json", "tokenizer_config.json"):  # not the run's, which has its length limit
            shutil.copy(model / name, options.out / name)
    compact(options.out / "tokenizer.json")
    shown = {name: value for name, value in report.metrics["valid"].items() if isinstance(value, float)}
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
