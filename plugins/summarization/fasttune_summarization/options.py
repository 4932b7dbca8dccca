"""The settings of the two tasks, as they stand in a run file under `options`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _holds(role: str) -> AfterValidator:
    """A template in which the role's placeholder stands once."""

    def check(prompt: str) -> str:
        if prompt.count(f"{{{role}}}") != 1:
            raise ValueError(f"expected {{{role}}} in it once, found it {prompt.count(f'{{{role}}}')} times")
        return prompt

    return AfterValidator(check)


def _check_search(options: Any) -> Any:
    if options.length_penalty is not None and options.beams == 1:
        raise ValueError("length_penalty needs beams above 1")
    if options.no_repeat_ngram_size == 1:
        raise ValueError("no_repeat_ngram_size 1 would let no token come twice; give 0, or 2 and more")
    return options


SourceLength = Annotated[
    int | None,
    Field(ge=2, description="Longest input in tokens with prefix or prompt; null is the model's own, to 1024."),
]
TargetLength = Annotated[
    int | None,
    Field(ge=2, description="Longest text to learn to write, in tokens, with its end; null is 128."),
]
NewTokens = Annotated[int | None, Field(ge=1, description="Tokens that are written at most; null is the above.")]
Prefix = Annotated[
    str | None,
    Field(description="Text before the input of an encoder-decoder; null is what its configuration states."),
]
Language = Annotated[
    str | None, Field(description="The language's code, for tokenizers that mark it (mBART, M2M100, NLLB).")
]
Beams = Annotated[int, Field(ge=1, description="Beams of the search for the best text; 1 is greedy.")]
LengthPenalty = Annotated[
    float | None,
    Field(
        allow_inf_nan=False, description="Beam search: above 0 favours longer texts, below 0 shorter; null is 1."
    ),
]
NoRepeat = Annotated[
    int,
    Field(
        ge=0,
        description="No sequence of so many tokens comes twice; 0 allows any. A decoder counts its prompt too.",
    ),
]


class _RewritingOptions(BaseModel):
    """What both tasks have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_source_length: SourceLength = None
    max_target_length: TargetLength = None
    prefix: Prefix = None
    prompt: str | None = None
    src_lang: Language = None
    tgt_lang: Language = None
    max_new_tokens: NewTokens = None
    beams: Beams = 1
    length_penalty: LengthPenalty = None
    no_repeat_ngram_size: NoRepeat = 0

    _check_search = model_validator(mode="after")(_check_search)


class SummarizationOptions(_RewritingOptions):
    """Settings of summarization."""

    prompt: Annotated[str, _holds("document")] | None = Field(
        None, description="What a decoder reads; null is '{document}\\n\\nSummary: '."
    )


class Text2TextOptions(_RewritingOptions):
    """Settings of text2text-generation."""

    prompt: Annotated[str, _holds("source")] | None = Field(
        None, description="What a decoder reads; null is '{source}\\n\\nAnswer: '."
    )


Options = SummarizationOptions | Text2TextOptions
