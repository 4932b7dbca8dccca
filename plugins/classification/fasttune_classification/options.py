"""The settings of the three tasks, as they stand in a run file under `options`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fasttune.errors import ConfigError, nearest

Smoothing = Annotated[
    float,
    Field(ge=0, lt=1, description="Share of the target spread evenly over all classes (both answers, for multi)."),
]
ClassWeights = Annotated[
    Literal["balanced"] | dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None,
    Field(
        description="Weight of each class in the loss, 1 where not named; 'balanced' is n / (k * n_c), written "
        "out in the resolved run file."
    ),
]
Threshold = Annotated[
    float, Field(gt=0, lt=1, description="multi: a class is predicted if its probability is at least this.")
]


class TextOptions(BaseModel):
    """Settings of text-classification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problem: Literal["single", "multi", "regression"] = Field(
        "single", description="One class a row, any number of classes a row, or a number."
    )
    max_length: int | None = Field(
        None, ge=1, description="Longest input in tokens; null is the model's own maximum, at most 512."
    )
    label_smoothing: Smoothing = 0.0
    class_weights: ClassWeights = None
    threshold: Threshold = 0.5

    @model_validator(mode="after")
    def _regression_has_no_classes(self) -> "TextOptions":
        if self.problem == "regression" and (self.label_smoothing or self.class_weights is not None):
            raise ValueError("label_smoothing and class_weights need classes; problem is 'regression'")
        return self


class ImageOptions(BaseModel):
    """Settings of image-classification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problem: Literal["single", "multi"] = Field("single", description="One class an image, or any number.")
    image_size: int | None = Field(
        None, ge=8, le=4096, description="Side of the square input in pixels; null is the processor's own size."
    )
    label_smoothing: Smoothing = 0.0
    class_weights: ClassWeights = None
    threshold: Threshold = 0.5


class AudioOptions(BaseModel):
    """Settings of audio-classification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problem: Literal["single", "multi"] = Field("single", description="One class a clip, or any number.")
    max_seconds: float | None = Field(
        30.0, gt=0, description="Longer clips are cut at their end; null keeps them whole, if the model can."
    )
    label_smoothing: Smoothing = 0.0
    class_weights: ClassWeights = None
    threshold: Threshold = 0.5


def class_weights(chosen: Any, counts: dict[str, int]) -> dict[str, float] | None:
    """The weight of every class by name, or None if the loss is unweighted.

    chosen: the option's value. counts: rows a class in train. Raises ConfigError if a name is no class of train,
    or if no class has weight.
    """
    if chosen is None:
        return None
    if chosen == "balanced":
        rows, classes = sum(counts.values()), len(counts)
        return {name: rows / (classes * count) for name, count in counts.items()}
    for name in chosen:
        if name not in counts:
            raise ConfigError(
                f"options.class_weights: {name!r} is not a class of train.{nearest(name, counts)} "
                f"The classes are: {', '.join(counts)}."
            )
    weights = {name: float(chosen.get(name, 1.0)) for name in counts}
    if not any(weights.values()):
        raise ConfigError("options.class_weights: every class has weight 0, so nothing would be learned")
    return weights
