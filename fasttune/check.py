"""`fasttune check`: everything before the first step, shown; nothing is trained, and nothing written but a picture
where the task draws its samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttune import config as configs
from fasttune.adapt import Adapted, native_precision
from fasttune.batching import Batches, Loader, cut, padded, to_device
from fasttune.config import RunConfig
from fasttune.data import Encoded, label_role
from fasttune.errors import ConfigError
from fasttune.folder import write_image
from fasttune.prepare import UNITS, adapt_bundle, open_task, prepare, width_of
from fasttune.progress import Progress
from fasttune.rows import media_kind
from fasttune.signals import Signals
from fasttune.task import Task, overrides
from fasttune.train import LossModule

_SAMPLES_SHOWN = 3
_SAMPLES_DRAWN = 8


def check(config: RunConfig, remote_code: str | None = None, draw: str | None = None) -> dict[str, Any]:
    """What a run would do, by name. Raises what the run would raise before step 0, all bad rows included.

    draw: the PNG of the first samples, where the task draws them; None: beside the run folder.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configs.resolve(config, precision=native_precision(device))
    if draw is not None and not overrides(open_task(config)[1], "sheet"):
        raise ConfigError(f"--draw: {config.task} draws no samples")
    with Signals() as signals:
        prepared = prepare(config, Progress(quiet=True), signals, remote_code)
    fresh_head = prepared.bundle.head_is_new and not prepared.bundle.writes_text
    config = configs.resolve_rates(config, width_of(prepared.bundle), fresh_head, prepared.bundle.clip)
    unit = UNITS[media_kind(prepared.task.columns)]
    costs = prepared.train.costs
    pack = prepared.task.pack if prepared.task.packs else None
    loader = Loader(prepared.train, prepared.bundle.padding, pack=pack)
    batches = Batches(loader, config.train.batch, 1, config.train.seed)
    steps = config.train.total_steps(batches.per_epoch)
    adapted = adapt_bundle(config, prepared.bundle, device)
    trained = sum(parameter.numel() for parameter in adapted.trained.values())
    counted = "rows" if label_role(prepared.task.columns) else "times"
    return {
        "task": f"{config.task} ({prepared.plugin.distribution} {prepared.plugin.version})",
        "rows": f"{prepared.train.usable_rows:,} train, {prepared.valid.usable_rows:,} valid",
        "notes": [
            *prepared.notes,
            f"attention: {adapted.attention}",
            *([f"layout: {adapted.layout}"] if adapted.layout else []),
        ],
        "classes": [f"{name}: {count:,} {counted}" for name, count in sorted(prepared.classes.items())],
        "bad rows left out": [str(row) for row in prepared.skipped],
        unit: f"{min(costs):,} to {max(costs):,} a sample, mean {np.mean(costs):,.1f}",
        "padding": f"{_padding(batches):.1%} in buckets of {config.train.batch}",
        "samples": [_describe(prepared.train, i) for i in _first_samples(prepared.train.owner, _SAMPLES_SHOWN)],
        **_draw(prepared.train, draw, config),
        "steps": f"{steps:,} of {config.train.batch} rows, {batches.per_epoch:,} an epoch",
        "strategy": f"{config.strategy.kind}, {trained:,} parameters trained in {config.train.precision}",
        "learning rate": f"{config.train.lr:g}, head {config.train.head_lr:g}",
        "memory": _forecast(adapted, batches, prepared.task, config.train.accumulation),
        "output": config.output,
    }


def _first_samples(owner: Sequence[int], most: int) -> list[int]:
    """The first sample of each of the first rows: a row may have many."""
    firsts = (i for i, row in enumerate(owner) if i == 0 or row != owner[i - 1])
    return list(islice(firsts, most))


def _draw(encoded: Encoded, file: str | None, config: RunConfig) -> dict[str, str]:
    """Writes `Task.sheet` of the first samples, as the first epoch varies them, if the task has it."""
    if not overrides(encoded.task, "sheet"):
        return {}
    first = _first_samples(encoded.owner, _SAMPLES_DRAWN)
    samples = [encoded.sample(i, (config.train.seed, 0)) for i in first]
    path = Path(file or f"{config.output}-samples.png")
    write_image(path, encoded.task.sheet(samples, encoded.bundle))
    return {"picture": f"{path}: the first {len(samples)} samples"}


def _padding(batches: Batches) -> float:
    costs, sides = batches.loader.encoded.costs, batches.loader.encoded.sides
    return 1 - sum(costs) / sum(padded(batch, costs, sides) for batch in batches.plan(0))


def _describe(encoded: Encoded, index: int) -> str:
    """A sample as the loss sees it: text decoded back from its tokens, the supervised values, shapes."""
    sample = encoded[index]
    number = encoded.rows.number(encoded.owner[index])
    if shown := encoded.task.show(sample, encoded.bundle):
        return f"row {number}: {shown}"
    tokenizer = getattr(encoded.bundle.processor, "tokenizer", encoded.bundle.processor)
    parts = []
    for name, array in sample.tensors.items():
        if name == "input_ids" and hasattr(tokenizer, "decode"):
            parts.append(f"{name} {list(array.shape)} {tokenizer.decode(array[:40].tolist())!r:.160}")
        elif array.size <= 8:
            parts.append(f"{name} {array.tolist()}")
        else:
            parts.append(f"{name} {list(array.shape)} {array.dtype}")
    return f"row {number}: " + "; ".join(parts)


def _forecast(adapted: Adapted, batches: Batches, task: Task, accumulation: int) -> str:
    """Weights, optimizer, and what one forward pass of the costliest batch keeps for its backward, in GB."""
    model, costs = adapted.bundle.model, batches.loader.encoded.costs
    costliest = max(batches.plan(0), key=lambda batch: max(costs[i] for i in batch) * len(batch))
    micro = batches.loader.load(cut(costliest, accumulation)[0])
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    adapted.train_mode()
    device = next(model.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        LossModule(model, task.loss)(to_device(micro.tensors, device))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in own)
    optimizer = sum(3 * master.numel() * master.element_size() for master in adapted.masters.values())
    total = weights + activations + optimizer
    return (
        f"{total / 1e9:.2f} GB: weights {weights / 1e9:.2f}, masters and optimizer {optimizer / 1e9:.2f}, "
        f"activations of the costliest batch {activations / 1e9:.2f}; the process itself comes on top"
    )
