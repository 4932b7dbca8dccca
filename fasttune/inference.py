"""A finished run, opened again: predict and score with what `best/` holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fasttune import config as configs
from fasttune import deformable
from fasttune.adapt import merge_lora, replace_dropout
from fasttune.batching import Loader
from fasttune.checkpoint import Disk
from fasttune.config import Lora, RunConfig
from fasttune.data import Encoded
from fasttune.errors import ConfigError, ModelError, OutputError
from fasttune.evaluate import evaluate, predict, spread
from fasttune.export import load_adapter, model_card, save_model
from fasttune.folder import RunFolder, write_image
from fasttune.media import Limits
from fasttune.prepare import build_bundle, open_task, prepare_rows, source_of
from fasttune.readers import MixedRows, Table, read
from fasttune.rows import media_kind
from fasttune.task import Bundle, Source, Task, overrides

_LONGEST_SHOWN = 400  # characters


class Model:
    """A trained model with its task. It computes in the type that its files hold, as whoever else opens them."""

    def __init__(self, task: Task, bundle: Bundle, config: RunConfig):
        self.task, self.bundle, self.config = task, bundle, config
        self.labels: list[str] = config.provenance["labels"]

    def predict(
        self,
        rows: str | Path | Iterable[Mapping[str, Any]],
        *,
        root: str | Path | None = None,
        draw: str | Path | None = None,
    ) -> list[Any]:
        """Predictions in the order of the rows. rows: a path or hub id, or mappings with the task's columns.
        root: the folder that paths of images and audio are relative to; None: the table's own.
        draw: a new or empty folder for a picture a row, 000001.png and so on, if the task draws any.

        Raises BadRows with every row that can't be used, ConfigError if the task draws nothing or the folder holds
        something, and OutputError if it can't be written.
        """
        folder = None if draw is None else self._folder_to_draw_in(Path(draw))
        encoded = self._encode(rows, root, labels=None)
        loader = Loader(encoded, self.bundle.padding)
        found = predict(self.task, self.bundle, loader, self._batch)
        if folder is not None:
            for position, prediction in found:
                picture = self.task.draw(encoded.rows.read(position, media=True), prediction, self.bundle)
                write_image(folder / f"{encoded.rows.number(position):06d}.png", picture)
        return [prediction for _, prediction in found]

    def _folder_to_draw_in(self, folder: Path) -> Path:
        if not overrides(self.task, "draw"):
            raise ConfigError(f"--draw: {self.config.task} draws no pictures")
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(f"--draw {folder}: holds something already; name a new or an empty folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--draw {folder}: can't be written: {error.strerror}") from error
        return folder

    def evaluate(
        self, rows: str | Path | Iterable[Mapping[str, Any]], *, root: str | Path | None = None
    ) -> dict[str, Any]:
        """Metrics on labelled rows; takes what `predict` takes."""
        return self.score(self._encode(rows, root, labels=self.labels))

    def score(self, encoded: Encoded, max_rows: int | None = None) -> dict[str, Any]:
        """Metrics on rows that are encoded already; on at most that many of them."""
        loader = Loader(encoded, self.bundle.padding)
        return evaluate(self.task, self.bundle, loader, self._batch, max_rows=max_rows)

    def samples(self, encoded: Encoded, rows: int) -> list[dict[str, Any]]:
        """Predictions for a few rows, spread evenly, beside what the rows hold: {"row", "holds", "prediction"}."""
        if not rows:
            return []
        loader = Loader(encoded, self.bundle.padding)
        found = predict(self.task, self.bundle, loader, self._batch, rows=spread(encoded, rows))
        return [
            {
                "row": encoded.rows.number(position),
                "holds": {role: _short(value) for role, value in encoded.rows.read(position).items()},
                "prediction": prediction,
            }
            for position, prediction in found
        ]

    def export(self, folder: str | Path, *, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes a plain transformers folder; LoRA is merged into the weights. Raises ConfigError if it exists."""
        folder = Path(folder)
        if folder.exists():
            raise ConfigError(f"--to {folder}: exists already; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        merge_lora(self.bundle.model)
        save_model(self.bundle, folder, model_card(self.config, metrics or {}, self.labels), Disk())

    @property
    def _batch(self) -> int:
        return self.config.eval.batch or 2 * self.config.train.batch

    def _encode(
        self, rows: str | Path | Iterable[Mapping[str, Any]], root: str | Path | None, labels: list[str] | None
    ) -> Encoded:
        limits = Limits(self.config.data.max_pixels, self.config.data.max_audio_seconds)
        named = dict(self.config.data.columns)
        if isinstance(rows, (str, Path)):
            folder = None if root is None else str(root)
            table = read(str(rows), media_kind(self.task.columns), "test", self.task.open, folder)
        else:
            table = Table("rows", MixedRows(dict(row) for row in rows), None if root is None else Path(root))
        # Rows made by hand name the roles, whatever the training data called its columns.
        named = {role: name for role, name in named.items() if name in table.columns or role not in table.columns}
        return prepare_rows(self.task, self.bundle, table, named, limits, labels)


def _short(value: Any) -> Any:
    """A value of a row for a report: bytes of a picture or a long text say little there."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} …"


def load(run: str | Path, *, remote_code: str | None = None) -> Model:
    """Opens the run in a folder that `finetune` left. Raises ConfigError or ModelError if there is none."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"{run}: holds no run (no {folder.config.name})")
    if not folder.best.is_dir():
        raise ModelError(f"{run}: the run has no best/ yet; finish it with --resume")
    config = configs.load(folder.config)
    _, task = open_task(config)
    labels = list(config.provenance["labels"])
    if isinstance(config.strategy, Lora):
        bundle = build_bundle(task, source_of(config, remote_code), labels, config.train.seed)
        load_adapter(bundle, folder.best, config.strategy)
    else:
        bundle = build_bundle(task, Source(folder.best), labels, config.train.seed)
    replace_dropout(bundle.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bundle.model.to(device).eval()
    deformable.replace(bundle.model, torch.float32, device)
    return Model(task, bundle, config)
