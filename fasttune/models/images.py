"""Image processors without torchvision."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from fasttune.errors import ModelError
from fasttune.models.checkpoint import LOADING_ERRORS, load_arguments, quiet, trouble
from fasttune.task import Source

PROCESSOR_FILE = "preprocessor_config.json"
SETTINGS = frozenset(
    {"do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
)
"""What processors of every class understand."""


def load_image_processor(source: Source, needed: Set[str]) -> Any:
    """The processor beside a model, on Pillow; where its class is not to be had (some need torchvision), the
    settings that its file states, as a dict.

    needed: keys without which settings are of no use. Raises ModelError if there is neither, or if the file is not
    JSON.
    """
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(source, backend="pil", **load_arguments(source))
    except LOADING_ERRORS as error:
        settings = _stated(source)
        if settings is None or not needed <= settings.keys():
            raise trouble(source, f"its image processor ({PROCESSOR_FILE})", error) from error
        return settings


def _stated(source: Source) -> dict[str, Any] | None:
    path = Path(source, PROCESSOR_FILE)
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model {str(source)!r}: {PROCESSOR_FILE} is not valid JSON: {error}") from error
    return settings if isinstance(settings, dict) else None
