"""Pretrain the summarization plugin's small encoder-decoder on the docstrings of the installed packages.

Reads docstrings (nothing is imported or downloaded), trains a tokenizer, then a small T5, and writes a
transformers model folder. Steps alternate between two objectives:

    spans      15 of the 64 tokens of a window, in runs of three, become sentinels, and are written
               (T5, https://arxiv.org/abs/1910.10683)
    sentences  one sentence of a docstring, every second time the first, becomes a sentinel, and is written
               (PEGASUS, https://arxiv.org/abs/1912.08777)

No docstring whose first paragraph is on the demo's valid side is read.

    python plugins/summarization/tools/pretrain_seq2seq.py --out model --minutes 20 --threads 1 --seed 0
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fasttune_summarization.demo.docstrings import docstrings, files, is_held_out, roots

SENTINELS = [f"<extra_id_{i}>" for i in range(16)]
SPECIAL = ["<pad>", "</s>", "<unk>", *SENTINELS]
PAD, END, UNK, FIRST = range(4)
WINDOW = 64  # tokens of a source
TARGET = 24  # tokens of a sentence and its end
SPANS, SPAN = 5, 3  # 15 of 64 tokens
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
EVERY = 100  # one docstring in so many tells how well the model does

Sentences = list[list[int]]
"""A document, as the tokens of each of its sentences."""

CARD = """\
---
license: apache-2.0
library_name: transformers
language: en
---

# Small documentation encoder-decoder

A T5 with {parameters:,} parameters ({layers} + {layers} layers, width {width}, {vocabulary} lower-cased
byte-level BPE tokens), pretrained on the docstrings of Python packages. It serves fasttune's demo where no hub is
reachable, and knows little beyond that domain.

## How it was made

    {command}

- Data: {docstrings:,} docstrings of the standard library and {packages} installed packages ({characters:,}
  characters, {tokens:,} tokens, exact repeats dropped), without those whose first paragraph is on the demo's valid
  side ({held_out:,} of them). Text and vocabulary change with the installed versions. Nothing was downloaded.
- Objectives, in turns: sentinels for 15 of the 64 tokens of a window (T5), and for one whole sentence
  of a docstring, every second time its first (PEGASUS); the prefix `<extra_id_0> ` asks a fine-tuned model for the
  sentence before a text.
- Training: {steps:,} steps of {batch} windows, {seen:,} tokens of source in {minutes} minutes on {threads} CPU
  thread(s), bfloat16 with float32 master weights, AdamW, peak learning rate {lr}.
- Loss on docstrings left out: {span_loss} a token of spans, {sentence_loss} a token of sentences.

## Licence

The weights are released under Apache-2.0. The training text is documentation of open-source packages (Apache-2.0,
BSD, MIT, PSF and similar licences); none of it is contained here.
"""


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 5120
    width: int = 192
    inner: int = 512
    layers: int = 2
    heads: int = 6
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 200
    decay: float = 0.3  # share of the steps over which the rate falls to 0


@dataclass
class Report:
    docstrings: int = 0
    held_out: int = 0
    packages: int = 0
    characters: int = 0
    tokens: int = 0
    steps: int = 0
    seen: int = 0
    minutes: float = 0.0
    span_loss: float = 0.0
    sentence_loss: float = 0.0


def read(report: Report) -> list[str]:
    """Every docstring once, but those of the demo's valid side."""
    found: dict[str, None] = {}
    packages = set()
    for name, root in roots(everything=True).items():
        for path in files(root):
            for text in docstrings(path):
                head = text.partition("\n\n")[0]
                if is_held_out(head):
                    report.held_out += 1
                elif len(text) >= 30:
                    found[text] = None
                    packages.add(name)
    report.docstrings, report.packages = len(found), len(packages)
    report.characters = sum(map(len, found))
    return list(found)


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Lower-case byte-level BPE; layout is collapsed, for a small model has no tokens to spare for it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[_.]+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Sentences]:
    """Each text as its sentences, each of them as its tokens."""
    sentences = [[part for part in SENTENCE.split(text) if part.strip()] for text in texts]
    flat = iter(tokenizer.encode_batch([part for parts in sentences for part in parts], add_special_tokens=False))
    return [[next(flat).ids for _ in parts] for parts in sentences]


def spans(documents: list[Sentences], settings: Settings, chance: random.Random) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of windows over documents drawn at random: source, [batch, WINDOW - SPANS * (SPAN - 1)], and
    target, [batch, SPANS * (SPAN + 1) + 1].
    """
    stream: list[int] = []
    while True:
        rows = []
        while len(rows) < settings.batch:
            while len(stream) < WINDOW:
                stream += [token for sentence in chance.choice(documents) for token in sentence] + [END]
            window, stream = stream[:WINDOW], stream[WINDOW:]
            rows.append(corrupt(window, chance))
        yield tuple(map(torch.tensor, zip(*rows, strict=True)))


def corrupt(window: list[int], chance: random.Random) -> tuple[list[int], list[int]]:
    """Five runs of three tokens apart from each other become sentinels; the target names each with its tokens."""
    gaps = sorted(chance.sample(range(WINDOW - SPANS * SPAN - SPANS + 1), SPANS))
    source, target, at = [], [], 0
    for i, gap in enumerate(gaps):
        start = gap + i * SPAN + i  # at least one token between two runs
        source += [*window[at:start], FIRST + i]
        target += [FIRST + i, *window[start : start + SPAN]]
        at = start + SPAN
    return source + window[at:], [*target, END]


def sentences(
    documents: list[Sentences], settings: Settings, chance: random.Random
) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches of (source, target), padded: [batch, WINDOW] and [batch, TARGET]."""
    rich = [d for d in documents if len(d) > 1 and any(4 <= len(s) < TARGET for s in d)]
    while True:
        rows = []
        while len(rows) < settings.batch:
            document = chance.choice(rich)
            places = [i for i, s in enumerate(document) if 4 <= len(s) < TARGET]
            place = chance.choice([places[0], chance.choice(places)])
            before = [token for sentence in document[:place] for token in sentence]
            after = [token for sentence in document[place + 1 :] for token in sentence]
            room = WINDOW - 2
            kept = before[len(before) - min(len(before), max(room // 2, room - len(after))) :]
            source = [*kept, FIRST, *after[: room - len(kept)], END]
            target = [*document[place], END]
            rows.append((source + [PAD] * (WINDOW - len(source)), target + [PAD] * (TARGET - len(target))))
        yield tuple(map(torch.tensor, zip(*rows, strict=True)))


def build(settings: Settings) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=settings.vocabulary,
        d_model=settings.width,
        d_kv=settings.width // settings.heads,
        d_ff=settings.inner,
        num_layers=settings.layers,
        num_heads=settings.heads,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        task_specific_params={"summarization": {"prefix": f"{SENTINELS[0]} "}},
    )
    return T5ForConditionalGeneration(config).to(torch.bfloat16)


def loss_of(model: T5ForConditionalGeneration, source: Tensor, target: Tensor) -> Tensor:
    labels = target.masked_fill(target == PAD, -100)
    logits = model(input_ids=source, attention_mask=(source != PAD).long(), labels=labels, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Masters:
    """AdamW on float32 copies: bfloat16 weights would swallow its small steps."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        self.weights = list(model.parameters())
        self.copies = [weight.detach().float() for weight in self.weights]
        self.adamw = torch.optim.AdamW(self.copies, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for copy, weight in zip(self.copies, self.weights, strict=True):
            weight.copy_(copy)


def train(
    model: T5ForConditionalGeneration,
    documents: list[Sentences],
    settings: Settings,
    arguments: argparse.Namespace,
    report: Report,
) -> None:
    """Trains for --steps, or until --minutes: the clock then decides where the rate begins to fall, and so the
    number of steps."""
    chance = random.Random(arguments.seed)
    sources = spans(documents, settings, chance), sentences(documents, settings, chance)
    optimizer, steps = Masters(model, settings.lr), arguments.steps or None
    began, step = time.perf_counter(), 0
    while True:
        minutes = (time.perf_counter() - began) / 60
        if steps is None and minutes >= arguments.minutes * (1 - settings.decay):
            steps = math.ceil((step + 1) / (1 - settings.decay))
        if step == steps:
            break
        loss = loss_of(model, *next(sources[step % 2]))
        loss.backward()
        falling = 1.0 if steps is None else (steps - step) / (steps * settings.decay)
        optimizer.step(settings.lr * min(1.0, (step + 1) / settings.warmup, falling))
        if step % 200 < 2:
            kind = ("spans", "sentences")[step % 2]
            print(f"step {step} of {steps}, {kind} {loss:.3f}, {minutes:.1f} min", flush=True)
        step += 1
    report.steps, report.seen = step, step * settings.batch * WINDOW
    report.minutes = round((time.perf_counter() - began) / 60, 1)


@torch.no_grad()
def evaluate(
    model: T5ForConditionalGeneration, documents: list[Sentences], settings: Settings, report: Report
) -> None:
    for name, make in (("span_loss", spans), ("sentence_loss", sentences)):
        batches = make(documents, settings, random.Random(0))
        losses = [float(loss_of(model, *next(batches))) for _ in range(10)]
        setattr(report, name, round(sum(losses) / len(losses), 3))


def save(model: T5ForConditionalGeneration, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(out)
    whole = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    # Saved indented, which doubles its size.
    compact = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(compact, encoding="utf-8")
    model.config.dropout_rate = 0.1  # as T5 does it: none in pretraining, a tenth when fine-tuned
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)
    model.save_pretrained(out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain the summarization plugin's small encoder-decoder.")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time, without reading")
    parser.add_argument("--steps", type=int, default=0, help="steps instead of --minutes, to repeat a run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=0, help="read so many docstrings at most; for a quick try")
    return parser.parse_args()


def main() -> None:
    arguments, settings, report = parse_arguments(), Settings(), Report()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    texts = read(report)
    random.Random(arguments.seed).shuffle(texts)
    texts = texts[: arguments.texts or None]
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    documents = encode(tokenizer, texts)
    report.tokens = sum(len(sentence) for document in documents for sentence in document)
    print(f"{report.docstrings} docstrings, {report.tokens} tokens", flush=True)
    model = build(settings)
    train(model, [d for i, d in enumerate(documents) if i % EVERY], settings, arguments, report)
    evaluate(model, documents[::EVERY], settings, report)
    save(model, tokenizer, arguments.out)
    command = (
        f"python plugins/summarization/tools/pretrain_seq2seq.py --out model --steps {report.steps} "
        f"--threads {arguments.threads} --seed {arguments.seed}"
    )
    values = {**asdict(settings), **asdict(report), "threads": arguments.threads, "command": command}
    values["parameters"] = sum(weight.numel() for weight in model.parameters())
    (arguments.out / "README.md").write_text(CARD.format(**values), encoding="utf-8")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
