"""What the demo needs and no hub serves: a small pretrained detector, and pictures of handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttune.task import Demo, every_strategy
from fasttune_detection.demo.digits import rows
from fasttune_detection.draw import sheet

TRAIN, VALID = 300, 100  # pictures
SEED = 7
SETTINGS: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": 8, "batch": 16, "lr": 1e-3, "head_lr": 1e-3},
    "head": {"epochs": 5, "batch": 16},
    "lora": {"epochs": 5, "batch": 16},
    "full": {"epochs": 6, "batch": 16},
}


def make() -> Demo:
    """Raises RuntimeError without scikit-learn."""
    return Demo(
        title="Where are the digits on this sheet of paper, and which? In handwriting that it has not seen.",
        model=str(Path(__file__).parent / "model"),
        train=rows("train", TRAIN, SEED),
        valid=rows("valid", VALID, SEED),
        variants=every_strategy(
            SETTINGS, options={"augment": {"flip": 0.0, "crop": 0.0}}, eval={"batch": 50, "every": 1000}
        ),
        before=True,
        picture=sheet,
    )
