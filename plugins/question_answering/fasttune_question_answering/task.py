"""question-answering: the words of a context that answer a question. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fasttune.errors import DataError
from fasttune.layouts import Opened, Place
from fasttune.task import Bundle, Column, Demo, Loss, Meter, Metric, Sample, Source, Task, every_strategy
from fasttune_question_answering import layouts
from fasttune_question_answering.answers import gold, named
from fasttune_question_answering.options import QuestionAnsweringOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

QUESTION_ALIASES = ("query", "question_text")
CONTEXT_ALIASES = ("passage", "paragraph", "document", "article", "text", "body", "content")
ANSWER_ALIASES = ("answer", "answer_text")
START_ALIASES = ("answer_offset", "answer_begin", "start_char")
IMPOSSIBLE_ALIASES = ("unanswerable", "no_answer")
ID_ALIASES = ("qid", "question_id", "uid")

# The demo's settings, tuned on two cores.
DEMO_TRAIN, DEMO_VALID, DEMO_SEED = 480, 120, 17
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": 8, "batch": 16, "lr": 2e-3},
    "head": {"epochs": 8, "batch": 16, "lr": 2e-2},
    "lora": {"epochs": 8, "batch": 16, "lr": 5e-3},
    "full": {"epochs": 4, "batch": 16, "lr": 1e-3},
}

START, END, NULL, OFFSETS = "start_positions", "end_positions", "null_position", "offsets"
"""What a sample holds beside the model's inputs: int64 [], [], [] and [T, 2]."""

_COUNTED = "unanswerable"


class QuestionAnswering(Task):
    """Any question-answering model of transformers that reads text, with its fast tokenizer. A sample is a window
    of a row's context."""

    Options = QuestionAnsweringOptions
    columns = (
        Column("question", "text", QUESTION_ALIASES),
        Column("context", "text", CONTEXT_ALIASES),
        Column("answers", "json", ANSWER_ALIASES, target=True),
        Column("answer_start", "json", START_ALIASES, required=False, target=True),
        Column("is_impossible", "json", IMPOSSIBLE_ALIASES, required=False, target=True),
        Column("id", "json", ID_ALIASES, required=False, target=True),  # names a question in messages
    )
    metrics = (Metric("f1", "max", primary=True), Metric("exact_match", "max"))

    @classmethod
    def open(cls, place: Place) -> Opened | None:
        """SQuAD 1.1 and 2.0."""
        rows = None if place.document is None else layouts.rows_of(place.document)
        return None if rows is None else Opened(rows)

    def count(self, row: Mapping[str, Any]) -> Iterable[str]:
        return () if gold(row) else (_COUNTED,)

    def resolve(self, counts: Mapping[str, int]) -> QuestionAnsweringOptions:
        if self.options.unanswerable is not None:
            return self.options
        return self.options.model_copy(update={"unanswerable": counts.get(_COUNTED, 0) > 0})

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no text model with a fast tokenizer, ConfigError if the options
        don't suit the model."""
        from fasttune_question_answering.build import build

        return build(source, self.options)

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> list[Sample]:
        """The windows of a row: the tokenizer's outputs, int64 [T], the characters of the context that each token
        shows, and the null position; with answers also the first one's place, the null position where it is not
        whole in the window.

        Raises DataError for answers that are not where they say, for texts without tokens, and in training for an
        answer that is whole in no window.
        """
        import numpy as np

        from fasttune.models.tokenizer import check_ids, stated_vocabulary
        from fasttune_question_answering.windows import Cutter

        answers = gold(row) if "answers" in row else None
        cutter = Cutter(bundle.processor, self.options.doc_stride, self.options.max_question_length)
        vocabulary = stated_vocabulary(bundle.model)
        try:
            windows, cut = cutter.windows(row["question"], row["context"])
            for window in windows:
                check_ids(window.tensors["input_ids"], bundle.processor, vocabulary, "context")
        except DataError as error:
            raise DataError(error.column, error.why + named(row)) from None
        places = [window.place(answers[0] if answers else None) for window in windows]
        if train and answers and all(place is None for place in places):
            raise DataError(
                "answers",
                f"{answers[0].text[:40]!r} is whole in none of {len(windows)} windows of at most "
                f"{bundle.processor.model_max_length} tokens: all targets are truncated; raise "
                f"options.max_length or options.doc_stride{named(row)}",
            )
        samples = []
        for window, place in zip(windows, places, strict=True):
            own = {OFFSETS: window.offsets, NULL: np.asarray(window.null, dtype=np.int64)}
            if answers is not None:
                start, end = place or (window.null, window.null)
                own |= {START: np.asarray(start, dtype=np.int64), END: np.asarray(end, dtype=np.int64)}
            samples.append(Sample(window.tensors | own, cost=len(window.offsets), truncated={"question": cut}))
        return samples

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """(cross entropy of the start + that of the end) / 2, over the positions of a window; the count is the
        number of windows."""
        return self._loss(*self._logits(model, batch), batch)

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[Any]:
        """What `spans.best_spans` finds in each window; `join` makes the answer of it."""
        return self._spans(*self._logits(model, batch), batch)

    def score(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> tuple[Loss, list[Any]]:
        start, end = self._logits(model, batch)
        return self._loss(start, end, batch), self._spans(start, end, batch)

    def join(self, predictions: list[Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """{"answer", "score", "start", "end"}, and "no_answer" where a question may have none."""
        from fasttune_question_answering.spans import best_answer

        return best_answer(
            predictions,
            row["context"],
            count=self.options.n_best,
            unanswerable=bool(self.options.unanswerable),
            threshold=self.options.no_answer_threshold,
        )

    def meter(self) -> Meter:
        from fasttune_question_answering.meters import AnswerMeter

        return AnswerMeter()

    def show(self, sample: Sample, bundle: Bundle) -> str:
        """Question and window, the answer marked."""
        from fasttune_question_answering.windows import shown

        return shown(sample.tensors, bundle.processor)

    @classmethod
    def demo(cls) -> Demo:
        """Types and defaults of parameters from what a docstring tells of them: text of the installed packages,
        and an encoder that was pretrained to find spans that recur in such text, though in none of the docstrings
        that are held out. Raises RuntimeError if too few packages are installed."""
        from fasttune.docstrings import split
        from fasttune_question_answering.demo.parameters import first_type, questions
        from fasttune_question_answering.meters import f1

        train, valid = split(questions, DEMO_TRAIN, DEMO_VALID, DEMO_SEED)
        first = [f1(first_type(row["context"]), row["answers"], empty_may_match=False) for row in valid]
        return Demo(
            title="What are the type and the default of this parameter? Found in its docstring.",
            model=str(Path(__file__).parent / "demo" / "model"),
            train=train,
            valid=valid,
            variants=every_strategy(DEMO_SETTINGS, options={"max_length": 256}),
            baselines={"first type told": 100 * sum(first) / len(first)},
        )

    @staticmethod
    def _logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of start and end, [N, T]; padding is never predicted."""
        own = (START, END, NULL, OFFSETS)
        outputs = model(**{name: value for name, value in batch.items() if name not in own})
        start, end = outputs.start_logits, outputs.end_logits
        if "attention_mask" not in batch:
            return start, end
        padding = batch["attention_mask"] == 0
        lowest = start.new_full((), float("-inf"))
        return start.where(~padding, lowest), end.where(~padding, lowest)

    @staticmethod
    def _loss(start: Tensor, end: Tensor, batch: dict[str, Tensor]) -> Loss:
        import torch

        from fasttune.ops import cross_entropy

        targets = torch.cat([batch[START], batch[END]])
        total = cast("Tensor", cross_entropy(torch.cat([start, end]), targets, reduction="sum"))
        return Loss(total.float() / 2, float(len(start)))

    def _spans(self, start: Tensor, end: Tensor, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        from fasttune_question_answering.spans import best_spans

        return best_spans(
            start,
            end,
            batch[OFFSETS],
            batch[NULL],
            longest=self.options.max_answer_length,
            count=self.options.n_best,
        )
