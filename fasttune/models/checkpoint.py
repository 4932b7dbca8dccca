"""Opens a pretrained model's folder or hub id: what is wrong with it becomes a ModelError in plain words."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.import_utils import is_timm_available

from fasttune.errors import ModelError
from fasttune.task import Source

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")

LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
    SafetensorError,
)
"""What transformers raises for a folder that it can't make a model, tokenizer or processor of."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' log lines and progress bars: a replaced head is expected, and stands in the notes."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_arguments(source: Source, weights: bool = False) -> dict[str, Any]:
    """`source.load_kwargs`, with use_safetensors only for weights.

    trust_remote_code is always stated: left out, transformers would ask on the terminal.
    """
    arguments = {"trust_remote_code": False, **source.load_kwargs}
    if not weights:
        arguments.pop("use_safetensors")
    return arguments


def check_folder(source: Source) -> None:
    """Raises ModelError if a local folder can't hold a model: says which file is missing, and what to do."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"model {str(source)!r} is a file; name the folder that holds config.json")
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model {str(source)!r} is an adapter (adapter_config.json), not a whole model. Merge it into "
            "its base first (`fasttune export RUN --to DIR`, or merge_and_unload() of PEFT)."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {str(source)!r} has no config.json; expected a folder written by save_pretrained, "
            f"found {_listing(folder)}"
        )
    if source.random_weights or any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"model {str(source)!r} has its weights only as {pickles[0]}, a format that can run code when it is "
            "opened. Convert it to safetensors (model.save_pretrained, where you trust the file) and try again."
        )
    raise ModelError(f"model {str(source)!r} has no weights; expected model.safetensors, found {_listing(folder)}")


def load_config(source: Source) -> PreTrainedConfig:
    """The model's configuration. Raises ModelError if it is missing, broken or of an unknown model_type."""
    check_folder(source)
    try:
        with quiet():
            return AutoConfig.from_pretrained(source, **load_arguments(source))
    except LOADING_ERRORS as error:
        raise ModelError(_config_trouble(source, error)) from error


def trouble(source: Source, what: str, error: BaseException) -> ModelError:
    """A ModelError for what transformers could not load, with the first paragraph of its reason."""
    return ModelError(f"model {str(source)!r}: {what} can't be loaded: {_first_paragraph(error)}")


def require_family(source: Source, config: PreTrainedConfig, task: str, mapping: Mapping[Any, Any]) -> None:
    """Raises ModelError unless transformers has a model class of this task for this configuration."""
    if type(config) in mapping:
        return
    if source.remote_code_revision and getattr(config, "auto_map", None):
        return
    made_for = ", ".join(_made_for(config)) or "none of fasttune's tasks"
    raise ModelError(
        f"model {str(source)!r} is of type {config.model_type!r}, which transformers can't use for {task}. "
        f"Models of this type do: {made_for}."
    )


def _made_for(config: PreTrainedConfig) -> list[str]:
    from transformers import (
        MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    )

    families = {
        "text-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "image-classification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "audio-classification": MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        "object-detection": MODEL_FOR_OBJECT_DETECTION_MAPPING,
        "image-segmentation": {
            *MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
            *MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
        },
        "text generation": MODEL_FOR_CAUSAL_LM_MAPPING,
        "sequence to sequence": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    return [name for name, configs in families.items() if type(config) in configs]


def _config_trouble(source: Source, error: BaseException) -> str:
    path = Path(source, "config.json")
    if not path.is_file():
        return (
            f"model {str(source)!r} is no local folder, and the hub can't serve it: {_first_paragraph(error)} "
            "Give a folder with config.json, or the id of a model that is in the hub's cache or reachable."
        )
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as broken:
        return f"model {str(source)!r}: config.json is not valid JSON: {broken}"
    if not isinstance(stated, dict):
        return f"model {str(source)!r}: config.json holds no JSON object"
    kind = stated.get("model_type")
    if "architecture" in stated and kind in (None, "timm_wrapper") and not is_timm_available():
        return f"model {str(source)!r} is a timm model: install timm and torchvision to use it"
    if kind is None:
        return f"model {str(source)!r}: config.json states no model_type, so transformers can't tell what it is"
    return f"model {str(source)!r}, of model_type {kind!r}, can't be loaded: {_first_paragraph(error)}"


def _first_paragraph(error: BaseException) -> str:
    text = str(error).strip().split("\n\n")[0]
    return " ".join(text.split())[:600] or type(error).__name__


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "an empty folder"
