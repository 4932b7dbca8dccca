"""Pretrain the summarization plugin's small encoder-decoder, a T5, on the docstrings of the installed packages.

Of each docstring come up to four rows, text in and text out:

    summary    its first paragraph, from the text behind it; in front stands the sentinel <extra_id_0>
    sentence   one sentence that became a sentinel (PEGASUS, https://arxiv.org/abs/1912.08777)
    spans      of two windows of forty words, four runs of two words that became sentinels
               (T5, https://arxiv.org/abs/1910.10683)

    python plugins/summarization/tools/pretrain_seq2seq.py --out model --steps 8000 --threads 1 --seed 0
"""

import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, T5Config

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from pretraining import Row, arguments, pretrain, read_docstrings, save_start, train_tokenizer

from fasttune.docstrings import Docstring

SENTINELS = [f"<extra_id_{i}>" for i in range(8)]
SPECIAL = ["<pad>", "</s>", "<unk>", *SENTINELS]
PAD, END = 0, 1
WINDOW, RUNS, RUN = 40, 4, 2  # words
MOST = 60  # words of a source
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


def rows_of(docstring: Docstring, chance: random.Random) -> Iterator[Row]:
    words = docstring.text.split()
    body = docstring.body.split()
    if len(body) >= 8 and 3 <= len(docstring.summary.split()) <= 24:
        yield {"source": " ".join([SENTINELS[0], *body[:MOST]]), "target": docstring.summary}
    sentences = [sentence.split() for sentence in SENTENCE.split(docstring.text)]
    places = [i for i, sentence in enumerate(sentences) if i and 3 <= len(sentence) <= 24]
    if places:
        place = chance.choice(places)
        before = [word for sentence in sentences[:place] for word in sentence]
        after = [word for sentence in sentences[place + 1 :] for word in sentence]
        around = [*before[-MOST // 2 :], SENTINELS[0], *after[: MOST // 2]]
        yield {"source": " ".join(around), "target": " ".join(sentences[place])}
    for start in chance.sample(range(max(1, len(words) - WINDOW + 1)), min(2, 1 + len(words) // (2 * WINDOW))):
        window = words[start : start + WINDOW]
        if len(window) >= 2 * RUNS * RUN:
            yield corrupt(window, chance)


def corrupt(window: list[str], chance: random.Random) -> Row:
    """Runs of words, apart from each other, become sentinels; the target names each with its words."""
    gaps = sorted(chance.sample(range(len(window) - RUNS * RUN), RUNS))
    source, target, at = [], [], 0
    for i, gap in enumerate(gaps):
        start = gap + i * RUN
        source += [*window[at:start], SENTINELS[i]]
        target += [SENTINELS[i], *window[start : start + RUN]]
        at = start + RUN
    return {"source": " ".join(source + window[at:]), "target": " ".join(target)}


def main() -> None:
    options = arguments(__doc__ or "", steps=8_000)
    texts, source = read_docstrings(options.seed, options.texts)
    chance = random.Random(options.seed)
    rows = [row for docstring in texts for row in rows_of(docstring, chance)]
    chance.shuffle(rows)
    tokenizer = train_tokenizer((docstring.text for docstring in texts), 5120, SPECIAL, flat=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    ids = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    config = T5Config(
        **ids,
        vocab_size=tokenizer.get_vocab_size(),
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=6,
        dropout_rate=0.0,
        task_specific_params={"summarization": {"prefix": f"{SENTINELS[0]} "}},
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as folder:
        save_start(Path(folder), config, tokenizer, ids, extra_special_tokens=SENTINELS, **names)
        pretrain(
            options,
            task="text2text-generation",
            model=Path(folder),
            auto=AutoModelForSeq2SeqLM,
            rows=rows,
            settings={
                "weights": "random",
                "options": {"max_source_length": 128, "max_target_length": 48, "prefix": ""},
                "eval": {"every": 4000, "max_rows": 100, "samples": 3},
            },
            train={"batch": 32, "lr": 2e-3, "schedule": {"kind": "linear", "warmup": 300}},
            card={
                "title": "Small documentation encoder-decoder",
                "what": "A T5 (2 + 2 layers, width 192, 5120 lower-cased byte-level BPE tokens) with",
                "objective": "the first paragraph of a docstring from the text behind it; one sentence from those "
                "around it\n  (PEGASUS); words that sentinels stand for (T5). The prefix `<extra_id_0> ` asks for "
                "the first paragraph.",
                **source,
            },
        )
    trained = T5Config.from_pretrained(options.out)
    trained.dropout_rate = 0.1  # as T5 does it: none in pretraining, a tenth when fine-tuned
    trained.save_pretrained(options.out)


if __name__ == "__main__":
    main()
