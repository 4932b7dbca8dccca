"""fasttune: fine-tune pretrained text, image and audio models. Importing it loads neither torch nor plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "finetune", "load"]

if TYPE_CHECKING:
    from fasttune.config import RunConfig
    from fasttune.run import finetune, load

_HOME = {"RunConfig": "fasttune.config", "finetune": "fasttune.run", "load": "fasttune.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fasttune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
