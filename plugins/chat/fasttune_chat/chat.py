"""text-generation: decoder-only language models that learn to answer in conversations, or to go on with a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttune.errors import ConfigError, DataError
from fasttune.task import Bundle, Column, Demo, Loss, Metric, Sample, Source, Task, every_strategy
from fasttune_chat.options import ChatOptions, is_jinja, named

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fasttune_chat.build import Built

# The demo's settings, tuned on two cores.
DEMO_TRAIN, DEMO_VALID, DEMO_SEED = 600, 100, 17
DEMO_SETTINGS: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": 3, "batch": 16, "lr": 2e-3},
    "head": {"epochs": 3, "batch": 16, "lr": 1e-3},
    "lora": {"epochs": 3, "batch": 16, "lr": 5e-3},
    "full": {"epochs": 3, "batch": 16, "lr": 1e-3},
}

_TO_PREDICT = "to_predict"  # marks a row whose reply or continuation is asked for
_PERPLEXITY_AT_MOST = 700.0  # exp of more is no float


class Chat(Task):
    """Conversations, instructions or plain text; any causal language model of transformers with its tokenizer."""

    Options = ChatOptions
    columns = (
        Column(
            "messages", "json", ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"), False
        ),
        Column("instruction", "json", ("prompt", "question", "query"), False),
        Column("input", "json", ("context",), False),
        Column("output", "json", ("completion", "response", "answer"), False, target=True),
        Column("text", "text", ("content", "document", "body"), False),
        Column("system", "json", ("system_prompt", "system_message"), False),
        Column("tools", "json", ("functions",), False),
    )
    metrics = (Metric("perplexity", "min", primary=True), Metric("token_accuracy", "max"), Metric("loss", "min"))

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._built: Built | None = None

    def check_columns(self, roles: frozenset[str]) -> None:
        if "messages" in roles or "text" in roles or ("output" in roles and roles & {"instruction", "input"}):
            return
        found = f"found only a column for {', '.join(sorted(roles))}" if roles else "found none of them"
        raise DataError(None, f"expected a column for messages, for instruction and output, or for text; {found}")

    def resolve(self, counts: Mapping[str, int]) -> ChatOptions:
        """A template's file becomes its text: the run needs the file no more. Raises ConfigError."""
        name = self.options.template
        if name in ("auto", "model", *named()) or is_jinja(name):
            return self.options
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"options.template: {name} can't be read: {error}") from error
        if not is_jinja(text):
            raise ConfigError(f"options.template: {name} holds no Jinja template")
        return self.options.model_copy(update={"template": text})

    def build(self, source: Source, labels: list[str]) -> Bundle:
        """Raises ModelError if the folder holds no decoder with a tokenizer, ConfigError if an option doesn't suit
        the model."""
        from fasttune_chat.build import build

        bundle, self._built = build(source, self.options)
        return bundle

    @property
    def built(self) -> Built:
        if self._built is None:
            raise RuntimeError("Chat.build comes before encode and pack")
        return self._built

    def to_predict(self, row: dict[str, Any]) -> dict[str, Any]:
        """Marks the row. A plain text in the place of a conversation is what its user says."""
        said = row.get("messages")
        if isinstance(said, str) and said.strip() and not said.lstrip().startswith("["):
            row = {**row, "messages": [{"role": "user", "content": said}]}
        return {**row, _TO_PREDICT: True}

    def encode(self, row: dict[str, Any], bundle: Bundle, train: bool) -> Sample | list[Sample]:
        """input_ids, attention_mask and labels, int64 [tokens]; for evaluation and prediction also prompt_ids and
        prompt_mask, int64 [tokens of the prompt], and prompt_cut, int64 []: tokens cut off its beginning.

        Raises DataError(column, why) for a row that can't be used, or whose targets are all cut off.
        """
        from fasttune_chat.encoding import Encoder

        rows = bundle.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        encoder = Encoder(bundle.processor, self.built, self.options, rows)
        return encoder.encode(row, train=train, ask=row.get(_TO_PREDICT, False))

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return self._built is not None and self._built.packing > 0

    def pack(self, samples: list[Sample]) -> list[Sample]:
        from fasttune_chat.packing import pack

        return pack(samples, self.built.packing) if self.packs else samples

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """Summed cross entropy of the supervised tokens, which are the count. A model in eval mode is also asked
        which token it finds likeliest, as the part "token_accuracy"; in training that would cost too much."""
        from fasttune.models.language import language_loss

        # Without a mask transformers reads the samples of a packed row from positions that begin anew.
        beside = "position_ids" if "position_ids" in batch else "attention_mask"
        inputs = {name: batch[name] for name in ("input_ids", beside)}
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        return language_loss(model, inputs, batch["labels"], shift=True, accuracy=not head.training)

    def score(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> tuple[Loss, None]:
        return self.loss(model, batch), None

    def decode(self, model: nn.Module, batch: dict[str, Tensor], bundle: Bundle) -> list[Any]:
        """{"reply"} to a conversation before its last answer, {"continuation"} of a text; "cut" tells how many
        tokens a prompt had too many. None for the later pieces of a long text."""
        from fasttune_chat.replies import replies

        return replies(model, batch, bundle.processor, self.built, self.options)

    def join(self, predictions: list[Any], row: Mapping[str, Any]) -> Any:
        return predictions[0]

    def show(self, sample: Sample, bundle: Bundle) -> str:
        from fasttune_chat.encoding import marked

        return marked(sample, bundle.processor)

    def meter(self) -> NoMeter:
        return NoMeter()

    def finish(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return {**metrics, "perplexity": math.exp(min(metrics["loss"], _PERPLEXITY_AT_MOST))}

    @classmethod
    def demo(cls) -> Demo:
        """What a function does, in a line, when its signature is named, in the style of the installed packages: a
        small Llama that was pretrained on such text, though on none of the lines that are held out. Raises
        RuntimeError if too few packages are installed."""
        from fasttune.docstrings import split
        from fasttune_chat.demo.signatures import conversations

        train, valid = split(conversations, DEMO_TRAIN, DEMO_VALID, DEMO_SEED)
        return Demo(
            title="What does this function do? The user writes its signature, the assistant a line.",
            model=str(Path(__file__).parent / "demo" / "model"),
            train=train,
            valid=valid,
            variants=every_strategy(
                DEMO_SETTINGS, options={"max_length": 384, "max_new_tokens": 32}, eval={"samples": 3}
            ),
        )


class NoMeter:
    """All metrics follow from the loss and its parts: a reply is shown, and not scored."""

    def update(self, prediction: Any, reference: Mapping[str, Any]) -> None:
        pass

    def merge(self, other: NoMeter) -> None:
        pass

    def result(self) -> dict[str, Any]:
        return {}
