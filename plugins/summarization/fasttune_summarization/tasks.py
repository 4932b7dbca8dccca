"""summarization and text2text-generation: one way of learning to write a text from a text, other columns.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fasttune.errors import DataError
from fasttune.task import Bundle, Column, Demo, Loss, Meter, Metric, Sample, Source, Task, every_strategy
from fasttune_summarization.options import SummarizationOptions, Text2TextOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fasttune_summarization.models import Writer

DOCUMENT_ALIASES = (
    "text",
    "article",
    "body",
    "content",
    "description",
    "documents",
    "dialogue",
    "dialog",
    "conversation",
    "transcript",
    "passage",
    "story",
    "report",
    "review",
    "source",
    "input",
)
SUMMARY_ALIASES = (
    "highlights",
    "synopsis",
    "headline",
    "tldr",
    "abstract",
    "gist",
    "title",
    "reference",
    "target",
    "output",
)
SOURCE_ALIASES = ("input", "text", "source_text", "input_text", "src", "sentence", "question", "instruction")
TARGET_ALIASES = ("output", "target_text", "output_text", "tgt", "label", "answer", "response", "reference")

# The demo's settings, tuned on two cores.
DEMO_TRAIN, DEMO_VALID, DEMO_SEED = 800, 120, 17
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": 4, "lr": 2e-3},
    "head": {"epochs": 4, "lr": 5e-3},
    "lora": {"epochs": 4, "lr": 5e-3},
    "full": {"epochs": 4, "lr": 1e-3},
}

_INPUTS = ("input_ids", "attention_mask", "global_attention_mask")


class Rewriting(Task):
    """Abstract: a task adds its columns, input first and text to write second, its Options and its prompt."""

    metrics = (
        Metric("rougeL", "max", primary=True),
        Metric("rouge1", "max"),
        Metric("rouge2", "max"),
        Metric("rougeLsum", "max"),
    )
    name: ClassVar[str]
    default_prompt: ClassVar[str]

    def resolve(self, counts: Mapping[str, int]) -> Any:
        """The options, the length penalty of a beam search written out. What depends on the model, such as its
        prefix, stands in the notes."""
        if self.options.beams == 1 or self.options.length_penalty is not None:
            return self.options
        return self.options.model_copy(update={"length_penalty": 1.0})

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """An encoder-decoder, or a decoder that reads a prompt, with its output projection. Raises ModelError if
        the folder holds neither, ConfigError if an option doesn't suit the model."""
        from fasttune_summarization.models import build_writer

        return build_writer(source, self.options, self._roles[0], self.name, self.default_prompt)

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample:
        """input_ids and attention_mask, int64 [tokens]: the input between prefix and end, or in its prompt.
        "labels", int64, if the row holds the text to write: [tokens of the text and its end] for an
        encoder-decoder; for a decoder input_ids goes on with them, and labels are -100 on the prompt.

        Too long an input loses its end, and so does too long a text to write, whose last token stays the end.
        Raises DataError(role, why) for a text without tokens, or with one outside the model's vocabulary.
        """
        from fasttune_summarization.encoding import encode_pair

        source, target = self._roles
        if row.get(source) is None:
            raise DataError(source, "expected text, found nothing (null)")
        return encode_pair(row[source], row.get(target), self._roles, cast("Writer", bundle))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """The cross entropy of the text to write and its end, summed in fp32; its tokens are the count."""
        return self._loss(model, {name: batch[name] for name in _INPUTS if name in batch}, batch["labels"])

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[Any]:
        """{role of the text: what the model writes}, by greedy or beam search."""
        return self._write(model, batch, bundle)

    def score(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> tuple[Loss, list[Any]]:
        """Loss and predictions; an encoder runs once for both."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        encoded: dict[str, Any] = {}
        config: Any = model.config
        if config.is_encoder_decoder:
            encoder: Any = model.get_encoder()  # type: ignore[operator]
            encoded = {"encoder_outputs": encoder(**inputs, return_dict=True)}
            inputs = {"attention_mask": inputs["attention_mask"], **encoded}
        # First the loss: a beam search spreads the encoder's output over its beams, in place.
        return self._loss(model, inputs, batch["labels"]), self._write(model, batch, bundle, **encoded)

    def show(self, sample: Sample, bundle: Bundle) -> str:
        from fasttune_summarization.encoding import show_pair

        return show_pair(sample, cast("Writer", bundle))

    def meter(self) -> Meter:
        from fasttune_summarization.rouge import RougeMeter

        return RougeMeter(self._roles[1])

    @property
    def _roles(self) -> tuple[str, str]:
        source, target = self.columns
        return source.role, target.role

    def _loss(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> Loss:
        from fasttune.models.language import decoder_inputs, language_loss

        encodes = model.config.is_encoder_decoder
        if encodes:
            inputs = {**inputs, "decoder_input_ids": decoder_inputs(model, labels)}
        return language_loss(model, inputs, labels, shift=not encodes)

    def _write(self, model: Any, batch: dict[str, Tensor], bundle: Bundle, **encoded: Any) -> list[dict[str, str]]:
        from fasttune.models.generation import generate
        from fasttune_summarization.encoding import IGNORED
        from fasttune_summarization.models import search_settings

        mask = batch["attention_mask"]
        if not model.config.is_encoder_decoder and "labels" in batch:
            mask = mask * (batch["labels"] == IGNORED)  # the prompt alone
        more = {name: batch[name] for name in ("global_attention_mask",) if name in batch}
        tokenizer = bundle.processor
        settings = search_settings(self.options, cast("Writer", bundle).layout) | more | encoded
        written = generate(model, tokenizer, batch["input_ids"], mask, **settings)
        return [{self._roles[1]: tokenizer.decode(ids, skip_special_tokens=True).strip()} for ids in written]


class Summarization(Rewriting):
    """A summary of a document."""

    Options = SummarizationOptions
    columns = (
        Column("document", "text", DOCUMENT_ALIASES),
        Column("summary", "text", SUMMARY_ALIASES, target=True),
    )
    name = "summarization"
    default_prompt = "{document}\n\nSummary: "

    @classmethod
    def demo(cls) -> Demo:
        """The summary line of a docstring from its body: text of the installed packages, and a small T5 that was
        pretrained on such text, though on none of the lines that are held out. Raises RuntimeError if too few
        packages are installed."""
        from fasttune.docstrings import split
        from fasttune_summarization.demo.docstrings import first_sentence, pairs
        from fasttune_summarization.rouge import rouge

        train, valid = split(pairs, DEMO_TRAIN, DEMO_VALID, DEMO_SEED)
        lead = [rouge(first_sentence(row["document"]), row["summary"])["rougeL"] for row in valid]
        return Demo(
            title="What is the summary line of this docstring? Written from its body.",
            model=str(Path(__file__).parent / "demo" / "model"),
            train=train,
            valid=valid,
            variants=every_strategy(
                DEMO_SETTINGS,
                eval={"batch": 60},
                options={"max_source_length": 160, "max_target_length": 32},
            ),
            baselines={"first sentence": sum(lead) / len(lead)},
        )


class Text2Text(Rewriting):
    """A text from a text: translation, correction, paraphrase, data to text."""

    Options = Text2TextOptions
    columns = (
        Column("source", "text", SOURCE_ALIASES),
        Column("target", "text", TARGET_ALIASES, target=True),
    )
    name = "text2text-generation"
    default_prompt = "{source}\n\nAnswer: "
