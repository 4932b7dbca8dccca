"""Pretrain the question-answering plugin's small encoder to find spans that recur, on docstrings.

A question is some words around a span, which is masked there; its answer is where the span stands in the rest of
the docstring (Ram et al., Few-Shot Question Answering by Pretraining Span Selection,
https://arxiv.org/abs/2101.00438). It begins with the encoder of the classification plugin's demo, made by
plugins/classification/tools/pretrain_encoder.py.

    python plugins/question_answering/tools/pretrain_spans.py --out model --steps 4000 --threads 1 --seed 0
"""

import random
import re
import sys
from collections import defaultdict
from pathlib import Path

from transformers import AutoModelForQuestionAnswering

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from pretraining import Row, arguments, pretrain, read_docstrings

ENCODER = Path(__file__).resolve().parents[2] / "classification/fasttune_classification/demo/encoder"
WORD = re.compile(r"\w+(?:[.\-]\w+)*")
# fmt: off
COMMON = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "do", "does", "each", "else",
    "for", "from", "has", "have", "if", "in", "into", "is", "it", "its", "may", "more", "must", "no",
    "not", "of", "on", "only", "or", "other", "same", "shall", "should", "so", "such", "than", "that",
    "the", "their", "then", "there", "these", "they", "this", "to", "was", "we", "when", "where", "which",
    "while", "will", "with", "you", "your", "none", "true", "false", "default", "optional", "return",
    "returns", "args",
})
# fmt: on
LONGEST = 4  # words of a span
AROUND = 6  # words before and behind it in the question
MOST = 700  # characters of a context
ROWS = 3  # of a docstring


def recurring(text: str) -> dict[str, list[tuple[int, int]]]:
    """Where spans of words stand that occur twice or more: characters, of each of its places."""
    words = [match.span() for match in WORD.finditer(text)]
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for length in range(1, LONGEST + 1):
        for first, last in zip(words, words[length - 1 :], strict=False):
            parts = text[first[0] : last[1]].lower().split()
            if len(parts) == length and parts[0] not in COMMON and parts[-1] not in COMMON:
                found[" ".join(parts)].append((first[0], last[1]))
    return {span: places for span, places in found.items() if len(places) > 1 and len(span) > 2}


def rows_of(text: str, chance: random.Random) -> list[Row]:
    """A row for some of the spans, longer ones first."""
    spans = recurring(text)
    chosen = sorted(chance.sample(sorted(spans), min(2 * ROWS, len(spans))), key=lambda span: -len(span))
    rows = []
    for span in chosen[:ROWS]:
        start, end = chance.choice(spans[span])
        before = list(WORD.finditer(text, 0, start))[-AROUND:]
        behind = list(WORD.finditer(text, end))[:AROUND]
        left = before[0].start() if before else start
        right = behind[-1].end() if behind else end
        question = f"{text[left:start]}[MASK]{text[end:right]}"
        context = text[:left] + text[right:]
        moved = [(a, b) for a, b in spans[span] if b <= left] + [
            (a - (right - left), b - (right - left)) for a, b in spans[span] if a >= right
        ]
        if moved and len(question.split()) > 2:
            place = chance.choice(moved)
            rows.append(
                {
                    "question": question,
                    "context": context,
                    "answers": context[slice(*place)],
                    "answer_start": place[0],
                }
            )
    return rows


def main() -> None:
    options = arguments(__doc__ or "", steps=4_000)
    texts, source = read_docstrings(options.seed, options.texts)
    chance = random.Random(options.seed)
    rows = [row for docstring in texts for row in rows_of(docstring.text[:MOST], chance)]
    chance.shuffle(rows)
    pretrain(
        options,
        task="question-answering",
        model=ENCODER,
        auto=AutoModelForQuestionAnswering,
        rows=rows,
        settings={"options": {"max_length": 256}, "eval": {"every": 2000}},
        train={"batch": 32, "lr": 1e-3, "schedule": {"kind": "linear", "warmup": 300}},
        card={
            "title": "Small documentation reader",
            "what": "A ModernBERT (4 layers, width 192, 7168 lower-cased byte-level BPE tokens) with a "
            "question-answering head,",
            "objective": "the place of a span in a docstring, from some words around another of its places, where "
            "it is masked\n  (recurring span selection, https://arxiv.org/abs/2101.00438), after masked language "
            "modelling by\n  plugins/classification/tools/pretrain_encoder.py, whose text had the held-out side "
            "in it.",
            **source,
        },
    )


if __name__ == "__main__":
    main()
