"""Pretrain the classification plugin's small encoder on the documentation of the installed packages.

Reads docstrings, Markdown, reStructuredText and package descriptions (nothing is imported or downloaded), trains
a tokenizer, then a small ModernBERT by masked language modelling, and writes a transformers model folder.

A second loss (weight --bow-weight) lets the mean-pooled window predict the masked tokens as a bag of words,
through the same head, so that the pooled features are trained and not only the token features (the idea of
DupMAE, https://arxiv.org/abs/2305.17000).

    python plugins/classification/tools/pretrain_encoder.py --out encoder --minutes 25 --threads 2 --seed 0
"""

import argparse
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fasttune.docstrings import docstrings
from fasttune_classification.demo.docstrings import mask_names, source_files

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))
WINDOW = 128
MASKED_PER_WINDOW = 38
MAX_POSITIONS = 512
ROPE = {"rope_theta": 160000.0, "rope_type": "default"}
HELD_OUT_EVERY = 100
MIN_TEXT_CHARACTERS = 30


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: fill-mask
language: en
---

# Small documentation encoder

A ModernBERT with {parameters:,} parameters ({layers} layers, hidden size {hidden_size}, {vocab_size} uncased
byte-level BPE tokens, at most 512 tokens of input, mean pooling), pretrained by masked language modelling on the
documentation of Python packages. It serves fasttune's demo and tests where no hub is reachable; it knows little
beyond that domain.

## How it was made

    {command}

- Data: docstrings of the standard library and docstrings, Markdown and reStructuredText files and descriptions
  of {packages} installed packages ({characters:,} characters, {corpus_tokens:,} tokens after exact repeats were
  dropped), test suites and vendored copies left out. Library names are masked in half of the texts. The text and
  the tokenizer's vocabulary change with the installed versions. Nothing was downloaded.
- Objective: 30% of the tokens masked in packed windows of {window} tokens; in addition the mean-pooled window
  predicts the masked tokens as a bag of words (weight {bow_weight}).
- Training: {steps:,} steps of {batch_size} windows, {tokens_seen:,} tokens in {minutes} minutes on {threads} CPU
  threads, bfloat16 with float32 master weights, AdamW, peak learning rate {learning_rate}.
- Held-out files: masked-token loss {valid_loss}, accuracy {valid_accuracy}.

The demo's rows come from the same packages: their text, never their labels, was seen in pretraining.

## Licence

The weights are released under Apache-2.0. The training text is documentation of open-source packages (Apache-2.0,
BSD, MIT, PSF and similar licences); none of it is contained here.
"""


@dataclass(frozen=True)
class Settings:
    vocab_size: int = 7168
    hidden_size: int = 192
    intermediate_size: int = 288
    layers: int = 4
    heads: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 300
    decay: float = 0.3


@dataclass
class Report:
    packages: list[str]
    characters: int
    corpus_tokens: int
    steps: int = 0
    tokens_seen: int = 0
    minutes: float = 0.0
    valid_loss: float = 0.0
    valid_accuracy: float = 0.0


def read_documents() -> tuple[list[list[str]], list[str]]:
    """Texts grouped by file, exact repeats dropped, and the packages they come from."""
    installed = Path(sysconfig.get_path("purelib"))
    documents, packages, seen = [], set(), set()
    for root in (Path(sysconfig.get_path("stdlib")), installed):
        for path in source_files(root, (".py", ".md", ".rst", "METADATA")):
            texts = []
            for text in (d.text for d in docstrings(path)) if path.suffix == ".py" else prose(path):
                if len(text) >= MIN_TEXT_CHARACTERS and text not in seen:
                    seen.add(text)
                    texts.append(text)
            if texts:
                documents.append(texts)
                package = path.relative_to(root).parts[0].removesuffix(".py") if root == installed else "stdlib"
                if not package.endswith(".dist-info"):
                    packages.add(package)
    return documents, sorted(packages)


def prose(path: Path) -> Iterator[str]:
    """Sections of a documentation file; of package metadata only the description after the headers."""
    if "licenses" in path.parts:
        return
    text = path.read_text(encoding="utf-8", errors="ignore")
    if path.name == "METADATA":
        text = text.partition("\n\n")[2]
    yield from (section.strip() for section in text.split("\n#"))


def mask_half(documents: list[list[str]], seed: int) -> list[list[str]]:
    """Half of the texts with library names masked, as the demo shows them."""
    chance = random.Random(seed)
    return [[mask_names(text) if chance.random() < 0.5 else text for text in texts] for texts in documents]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Lower-case byte-level BPE; layout is collapsed, since a small model has no tokens to spare for it."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    layout = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Prepend(" ")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *layout])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r" ?_"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[list[str]]) -> torch.Tensor:
    """One stream of token ids in which every text ends with [SEP]."""
    texts = [text for document in documents for text in document]
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(SEP)
    return torch.tensor(ids)


def windows(stream: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Full windows from an offset, each with [CLS] in its first place."""
    count = (len(stream) - offset) // (WINDOW - 1)
    cut = stream[offset : offset + count * (WINDOW - 1)].view(count, WINDOW - 1)
    return torch.cat([torch.full((count, 1), CLS), cut], dim=1)


def batches(stream: torch.Tensor, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless epochs; each cuts the stream at another offset and shuffles the windows."""
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        epoch = windows(stream, offset)
        order = torch.randperm(len(epoch), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield epoch[order[start : start + batch_size]]


def mask_tokens(
    ids: torch.Tensor, vocab_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, flat places and labels: a fixed number per window; of these 80% [MASK], 10% random, 10% kept.

    The fixed number keeps every shape static for torch.compile.
    """
    rank = torch.rand(ids.shape, generator=generator).masked_fill_(ids < len(SPECIAL_TOKENS), 2.0)
    columns = rank.argsort(dim=1)[:, :MASKED_PER_WINDOW]
    places = (columns + torch.arange(len(ids)).unsqueeze(1) * ids.shape[1]).flatten()
    labels = ids.flatten()[places]
    draw = torch.rand(len(places), generator=generator)
    replaced = torch.where(draw < 0.8, MASK, labels)
    noise = torch.randint(len(SPECIAL_TOKENS), vocab_size, (len(places),), generator=generator)
    replaced = torch.where((draw >= 0.8) & (draw < 0.9), noise, replaced)
    inputs = ids.flatten().scatter(0, places, replaced).view_as(ids)
    return inputs, places, labels


def build_model(settings: Settings) -> ModernBertForMaskedLM:
    config = ModernBertConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=MAX_POSITIONS,
        # transformers 5.13 can't read a ModernBERT without sliding layers; these slide over all there is.
        layer_types=["full_attention"] + ["sliding_attention"] * (settings.layers - 1),
        local_attention=2 * MAX_POSITIONS,
        rope_parameters={kind: dict(ROPE) for kind in ("full_attention", "sliding_attention")},
        pad_token_id=PAD,
        bos_token_id=CLS,
        cls_token_id=CLS,
        eos_token_id=SEP,
        sep_token_id=SEP,
        mask_token_id=MASK,
        classifier_pooling="mean",
        attn_implementation="eager",
    )
    return ModernBertForMaskedLM(config).to(torch.bfloat16)


class Objective:
    """Masked-token loss, right predictions, and the loss of the pooled window predicting the masked tokens."""

    def __init__(self, model: ModernBertForMaskedLM, compiled: bool) -> None:
        self.model = model
        self._compute = torch.compile(self._losses) if compiled else self._losses

    def __call__(self, masked: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._compute(*masked)

    def _losses(self, inputs: torch.Tensor, places: torch.Tensor, labels: torch.Tensor):
        hidden = self.model.model(input_ids=inputs).last_hidden_state
        logits = self.model.decoder(self.model.head(hidden.flatten(0, 1)[places])).float()
        pooled = self.model.decoder(self.model.head(hidden.mean(dim=1))).float().log_softmax(dim=-1)
        bag = -pooled.gather(1, labels.view(len(inputs), -1)).mean()
        return F.cross_entropy(logits, labels), bag, (logits.detach().argmax(-1) == labels).float().mean()


class MasterWeights:
    """AdamW on float32 copies: steps smaller than bfloat16's resolution would be lost on the weights."""

    def __init__(self, model: ModernBertForMaskedLM, settings: Settings) -> None:
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        decayed = [master for master in self.masters if master.ndim > 1]
        plain = [master for master in self.masters if master.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)

    def step(self, learning_rate: float) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)


def learning_rate(step: int, steps: int | None, settings: Settings) -> float:
    """Linear warm-up, a plateau, then linear decay to zero over the last steps, once their number is known."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    left = 1.0 if steps is None else (steps - step) / (steps * settings.decay)
    return settings.learning_rate * min(warmup, left)


def train(
    objective: Objective, stream: torch.Tensor, settings: Settings, arguments: argparse.Namespace, report: Report
) -> None:
    """Train for --steps, or until --minutes: the time decides where the decay begins, and so the steps.

    A run by --minutes is repeated exactly by giving --steps the number it reports.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    optimizer = MasterWeights(objective.model, settings)
    steps = arguments.steps or None
    began = time.perf_counter()
    for step, ids in enumerate(batches(stream, settings.batch_size, generator)):
        elapsed = (time.perf_counter() - began) / 60
        if steps is None and elapsed >= arguments.minutes * (1 - settings.decay):
            steps = math.ceil(step / (1 - settings.decay))
        if step == steps:
            break
        mlm, bag, _ = objective(mask_tokens(ids, settings.vocab_size, generator))
        (mlm + arguments.bow_weight * bag).backward()
        optimizer.step(learning_rate(step, steps, settings))
        if step % 200 == 0:
            print(f"step {step} of {steps} mlm {mlm:.3f} bag {bag:.3f} {elapsed:.1f} min", flush=True)
    report.steps, report.tokens_seen = step, step * settings.batch_size * WINDOW
    report.minutes = round((time.perf_counter() - began) / 60, 1)


@torch.no_grad()
def evaluate(objective: Objective, stream: torch.Tensor, settings: Settings, report: Report) -> None:
    """Mean masked-token loss and accuracy on held-out files with fixed masks."""
    generator = torch.Generator().manual_seed(0)
    held_out = windows(stream)
    starts = range(0, len(held_out) - settings.batch_size + 1, settings.batch_size)
    full = [held_out[start : start + settings.batch_size] for start in starts]
    results = [objective(mask_tokens(chunk, settings.vocab_size, generator)) for chunk in full]
    report.valid_loss = round(sum(float(mlm) for mlm, _, _ in results) / len(results), 3)
    report.valid_accuracy = round(sum(float(accuracy) for _, _, accuracy in results) / len(results), 3)


def save(model: ModernBertForMaskedLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": token for name, token in zip(names, SPECIAL_TOKENS, strict=True)}
    # ModernBERT has no segment embeddings and rejects token_type_ids.
    inputs = ["input_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, model_input_names=inputs, **special
    )
    fast.save_pretrained(out)
    compact = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    # Saved indented, which doubles its size.
    (out / "tokenizer.json").write_text(
        json.dumps(compact, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )
    model.config.architectures = ["ModernBertForMaskedLM"]
    model.save_pretrained(out)


def write_card(
    out: Path, parameters: int, settings: Settings, arguments: argparse.Namespace, report: Report
) -> None:
    """A model card whose command gives the number of steps, since --minutes depends on the machine."""
    command = (
        f"python plugins/classification/tools/pretrain_encoder.py --out encoder --steps {report.steps} "
        f"--threads {arguments.threads} --seed {arguments.seed}"
    )
    values = {**asdict(settings), **asdict(report), "packages": len(report.packages), "parameters": parameters}
    values |= {"window": WINDOW, "bow_weight": arguments.bow_weight, "threads": arguments.threads}
    (out / "README.md").write_text(CARD.format(command=command, **values), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain the classification plugin's small encoder.")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time, without reading the corpus")
    parser.add_argument("--steps", type=int, default=0, help="steps instead of --minutes, to repeat a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bow-weight", type=float, default=0.3, help="weight of the pooled bag-of-words loss")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--eager", action="store_true", help="no torch.compile, which needs a C++ compiler")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(learning_rate=arguments.learning_rate)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    documents, packages = read_documents()
    documents = mask_half(documents, arguments.seed)
    tokenizer = train_tokenizer((text for texts in documents for text in texts), settings.vocab_size)
    held_out = encode(tokenizer, documents[::HELD_OUT_EVERY])
    stream = encode(tokenizer, [texts for place, texts in enumerate(documents) if place % HELD_OUT_EVERY])
    report = Report(packages, sum(len(text) for texts in documents for text in texts), len(stream) + len(held_out))
    print(f"{report.characters} characters, {report.corpus_tokens} tokens, {len(packages)} packages", flush=True)
    objective = Objective(build_model(settings), compiled=not arguments.eager)
    train(objective, stream, settings, arguments, report)
    evaluate(objective, held_out, settings, report)
    save(objective.model, tokenizer, arguments.out)
    parameters = sum(weight.numel() for weight in objective.model.parameters())
    write_card(arguments.out, parameters, settings, arguments, report)
    print(json.dumps({**asdict(settings), **asdict(report)}))


if __name__ == "__main__":
    main()
