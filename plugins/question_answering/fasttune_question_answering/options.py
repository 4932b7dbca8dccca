"""The settings of question-answering, as they stand in a run file under `options`."""

from pydantic import BaseModel, ConfigDict, Field


class QuestionAnsweringOptions(BaseModel):
    """Settings of question-answering."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_length: int | None = Field(
        None, ge=1, description="Longest window in tokens; null is the model's own maximum, at most 384."
    )
    doc_stride: int | None = Field(
        None,
        ge=0,
        description="Tokens of the context that neighbouring windows share; null is 128, at most half a window.",
    )
    max_question_length: int = Field(64, ge=1, description="Longer questions lose their end, in tokens.")
    max_answer_length: int = Field(30, ge=1, description="Longest answer to predict, in tokens.")
    n_best: int = Field(20, ge=1, description="Spans that share the probability of a prediction.")
    unanswerable: bool | None = Field(
        None,
        description="Whether a prediction may be that there is no answer; null: if train has such rows.",
    )
    no_answer_threshold: float = Field(
        0.0,
        allow_inf_nan=False,
        description="There is no answer if the null score exceeds the best span's by more than this.",
    )
