"""From a clip to what an audio model takes: resampling, cutting, features."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from transformers import AutoFeatureExtractor

from fasttune.errors import DataError, ModelError
from fasttune.models.checkpoint import LOADING_ERRORS, load_arguments, quiet, trouble
from fasttune.task import Source

SHORTEST_SECONDS = 0.025
"""One window of a spectrogram."""

_MEL_WINDOW, _MEL_HOP = 400, 160  # samples, as Kaldi's features and AST count them at 16 kHz


@dataclass(frozen=True)
class Clip:
    """samples: float32 [samples] at the model's rate. cut: samples that were left out."""

    samples: np.ndarray
    cut: int


def load_extractor(source: Source) -> Any:
    """The feature extractor beside a model. Raises ModelError if there is none, or none for audio."""
    try:
        with quiet():
            extractor = AutoFeatureExtractor.from_pretrained(source, **load_arguments(source))
    except LOADING_ERRORS as error:
        if Path(source).is_dir() and not Path(source, "preprocessor_config.json").is_file():
            raise ModelError(
                f"model {str(source)!r} has no feature extractor; expected preprocessor_config.json beside "
                "config.json. Copy it from the model it was trained from."
            ) from error
        raise trouble(source, "its feature extractor (preprocessor_config.json)", error) from error
    if not getattr(extractor, "sampling_rate", None):
        raise ModelError(f"model {str(source)!r}: its preprocessor_config.json is not one for audio")
    return extractor


def fit_extractor(extractor: Any, model: Any) -> None:
    """Has the extractor make no attention mask for a model that takes none."""
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        extractor.return_attention_mask = False


def fixed_samples(extractor: Any) -> int | None:
    """How many samples an extractor makes of every clip, by cutting or padding; None if lengths stay."""
    if hasattr(extractor, "n_samples"):  # Whisper
        return extractor.n_samples
    if isinstance(getattr(extractor, "max_length", None), int):  # AST, in frames
        return _MEL_WINDOW + _MEL_HOP * (extractor.max_length - 1)
    return None


def clip(audio: Any, extractor: Any, max_seconds: float | None) -> Clip:
    """Resamples to the extractor's rate and cuts the end. audio: `.samples` float32 [frames], `.rate` in Hz."""
    samples, rate = np.asarray(audio.samples, dtype=np.float32), extractor.sampling_rate
    if not np.isfinite(samples).all():
        raise DataError("audio", "the clip holds NaN or infinity")
    if audio.rate != rate:
        samples = soxr.resample(samples, audio.rate, rate).astype(np.float32, copy=False)
    shortest = int(SHORTEST_SECONDS * rate)
    if samples.size < shortest:
        raise DataError("audio", f"{samples.size / rate:.3f} s of sound; at least {SHORTEST_SECONDS} s are needed")
    limits = [fixed_samples(extractor), None if max_seconds is None else max(shortest, int(max_seconds * rate))]
    kept = min([samples.size, *(limit for limit in limits if limit is not None)])
    return Clip(samples[:kept], samples.size - kept)


def features(samples: np.ndarray, extractor: Any, config: Any, train: bool) -> dict[str, np.ndarray]:
    """The extractor's tensors of one clip. Raises DataError if the clip gives the model not a single frame.

    Models that mask spans of frames while training can't take a batch shorter than one span: such a clip is
    filled up with silence.
    """
    arguments: dict[str, Any] = {}
    if hasattr(config, "conv_kernel"):
        if samples.size < (shortest := _field(config, 1)):
            raise DataError("audio", f"{samples.size} samples; the model needs at least {shortest} for one frame")
        masks = getattr(config, "apply_spec_augment", False) and getattr(config, "mask_time_prob", 0) > 0
        if train and masks and samples.size < (span := _field(config, config.mask_time_length + 1)):
            arguments = {"padding": "max_length", "max_length": span}
    made = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np", **arguments)
    return {name: _typed(np.asarray(value)[0]) for name, value in made.items()}


def _typed(array: np.ndarray) -> np.ndarray:
    kind = np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64
    return np.ascontiguousarray(array, dtype=kind)


def _field(config: Any, frames: int) -> int:
    """How many samples a stack of convolutions needs for so many frames."""
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames
