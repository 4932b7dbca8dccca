"""The settings of text-generation, as they stand in a run file under `options`."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

TEMPLATES = Path(__file__).parent / "templates"


class ChatOptions(BaseModel):
    """Settings of text-generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str = Field(
        "auto",
        min_length=1,
        description="How a conversation becomes text: model (the tokenizer's own chat template), alpaca, chatml, "
        "gemma, llama3 or mistral, a file with a Jinja template, or the template itself. auto is the model's own, "
        "or chatml if it has none.",
    )
    template_variables: dict[str, Any] = Field(
        {}, description="Variables that the template reads, such as {enable_thinking: false}."
    )
    add_tokens: tuple[str, ...] = Field(
        (),
        description="Special tokens that the vocabulary shall have; embeddings of new ones are trained.",
    )
    supervise: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="What the loss is on: all that the assistant says, its last turn alone, or every token.",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Longest sample in tokens: a longer conversation loses its end, a longer text is cut in "
        "pieces. null is what the model takes, at most 2048.",
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Several samples a row, each seeing itself alone. auto: where attention skips what a sample "
        "does not see (flash attention); elsewhere buckets of like length are faster.",
    )
    max_new_tokens: int = Field(256, ge=1, description="Longest reply in tokens.")
    beams: int = Field(1, ge=1, description="Beams of the search for a reply; 1 takes the likeliest token.")

    @field_validator("template")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value in ("auto", "model", *named()) or is_jinja(value) or os.path.isfile(os.path.expanduser(value)):
            return value
        from fasttune.errors import nearest

        known = ("auto", "model", *named())
        raise ValueError(
            f"no template or file is named {value!r}.{nearest(value, known)} Known: {', '.join(known)}; or give a "
            "file, or the template itself"
        )


def named() -> tuple[str, ...]:
    """The templates that come with the plugin."""
    return tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))


def is_jinja(text: str) -> bool:
    """Whether it is a template, and not the name of one."""
    return "{{" in text or "{%" in text
