"""finetune(config) -> Report: the composition root, the only place that sees the whole config.

config -> task -> rows -> samples -> batches -> model (adapted) -> train -> checkpoint -> evaluate -> report.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fasttune import config as configs
from fasttune.adapt import Adapted, native_precision
from fasttune.batching import Batches, Loader, MicroBatch, Position, plan_in_order_of_cost, to_device
from fasttune.checkpoint import Checkpoints, Disk, State, disk_fault, verify
from fasttune.config import Head, Lora, RunConfig
from fasttune.errors import CheckpointError, ConfigError, OutputError, Stopped
from fasttune.evaluate import evaluate
from fasttune.export import install, model_card, save_adapter, save_model
from fasttune.features import CachedBase, cache_features
from fasttune.folder import RunFolder, plain, write_text
from fasttune.inference import Model, load
from fasttune.memory import keeps_pages, limit_primitive_cache, peak_memory, return_free_memory
from fasttune.ops import forget_uses, used
from fasttune.optim import Optimizer
from fasttune.prepare import (
    UNITS,
    Prepared,
    adapt_bundle,
    build_bundle,
    data_report,
    prepare,
    source_of,
    truncated_shares,
    width_of,
)
from fasttune.progress import Progress
from fasttune.report import Report, dangers, read_records, render
from fasttune.rows import media_kind
from fasttune.signals import Signals
from fasttune.task import primary_metric
from fasttune.train import LossModule, StepRecord, train

_STEPS_BETWEEN_TRIMS = 8

__all__ = ["Model", "finetune", "load"]


def finetune(
    config: RunConfig | None = None,
    *,
    resume: bool = False,
    remote_code: str | None = None,
    quiet: bool = False,
    disk: Disk | None = None,
    **settings: Any,
) -> Report:
    """Fine-tunes a model and leaves a run folder: `best/`, `last/`, metrics, report, checkpoints.

    config: a RunConfig, or its keys as keyword arguments (task=, model=, data={"train": ...}, ...).
    resume: go on from the newest checkpoint of the output folder that verifies. remote_code: "repo@commit" whose
    code may run. Raises a FasttuneError that says what to mend, before step 0 where that can be known; Stopped,
    after a checkpoint, if SIGINT or SIGTERM came.
    """
    if config is not None and settings:
        raise ConfigError(f"give a RunConfig or keywords, not both; found {', '.join(settings)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit_primitive_cache()
    forget_uses()
    config = configs.resolve(config or configs.build(settings), precision=native_precision(device))
    if isinstance(config.strategy, Lora) and config.weights == "random":
        raise ConfigError("strategy lora adapts pretrained weights; weights random needs strategy full")
    progress = Progress(quiet)
    with Signals() as signals, RunFolder(config.output).open(resume=resume) as folder:
        try:
            prepared = prepare(config, progress, signals, remote_code)
            bundle = prepared.bundle
            fresh_head = bundle.head_is_new and not bundle.writes_text
            config = configs.resolve_rates(config, width_of(bundle), fresh_head, bundle.clip)
            config = _written_out(config, prepared)
            for note in prepared.notes:
                progress.note(note)
            run = _Run(config, prepared, folder, progress, signals, device, disk or Disk())
            return run.go(resume)
        finally:
            progress.close()


def _written_out(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with the task's options resolved, and what it takes to tell whether another run is the same."""
    packages = ("fasttune", "torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy")
    plugin = prepared.plugin
    provenance = {
        "labels": prepared.labels,
        "data": prepared.fingerprint,
        "plugin": {"distribution": plugin.distribution, "version": plugin.version, "entry_point": plugin.value},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }
    options = prepared.task.options.model_dump(mode="json")
    data = config.data.model_copy(update={"valid": prepared.valid_from})
    return config.model_copy(update={"options": options, "data": data, "provenance": provenance})


@dataclass
class _Best:
    """How far the run has come; kept in every checkpoint."""

    step: int = 0
    value: float | None = None  # of the primary metric; None if not finite
    loss: float | None = None
    without_gain: int = 0
    seconds: float = 0.0
    pending: bool = False  # the checkpoint's step is due for an evaluation that was stopped
    ops: dict[str, dict[str, str]] = field(default_factory=dict)  # who ran each, and why; of all processes

    def note_ops(self) -> None:
        self.ops = dict(sorted({**self.ops, **{op: vars(backend) for op, backend in used().items()}}.items()))


class _Run:
    """One run, from prepared data to the report."""

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        folder: RunFolder,
        progress: Progress,
        signals: Signals,
        device: torch.device,
        disk: Disk,
    ):
        self.config, self.prepared, self.folder = config, prepared, folder
        self.progress, self.signals, self.device, self.disk = progress, signals, device, disk
        self.metric = primary_metric(prepared.task)
        self.best = _Best()
        self.checkpoints = Checkpoints(folder.checkpoints, config.save.keep, disk)
        self.adapted, self.cached = self._adapt()
        self.batches, self.valid = self._loaders()
        if self.cached is not None:
            self._fill_cache(self.cached)
        self.steps = config.train.total_steps(self.batches.per_epoch)
        self.optimizer = Optimizer(self.adapted, config.train, self.steps)
        self.progress.unit = UNITS[media_kind(prepared.task.columns)]
        self._check_space()

    def _adapt(self) -> tuple[Adapted, CachedBase | None]:
        train, strategy = self.config.train, self.config.strategy
        adapted = adapt_bundle(self.config, self.prepared.bundle, self.device)
        trained = sum(parameter.numel() for parameter in adapted.trained.values())
        everything = sum(parameter.numel() for parameter in self.prepared.bundle.model.parameters())
        notes = [
            f"strategy {strategy.kind}: {trained:,} of {everything:,} parameters trained, in {train.precision}",
            f"attention: {adapted.attention}",
            *([f"layout: {adapted.layout}"] if adapted.layout else []),
            f"memory: {'tensors keep their pages' if keeps_pages() else 'freed pages go back to the system'}",
        ]
        self.prepared.notes += notes
        cached = None
        if isinstance(strategy, Head):
            packs = self.prepared.task.packs
            cached = None if packs else cache_features(self.prepared.bundle, strategy.cache_gb)
        if isinstance(strategy, Head) and cached is None:
            why = "samples are packed" if packs else "head and base of this model can't be run apart"
            why = why if strategy.cache_gb else "strategy.cache_gb is 0"
            self.progress.note(f"features of the base are computed anew in every epoch: {why}")
        for note in notes:
            self.progress.note(note)
        return adapted, cached

    def _loaders(self) -> tuple[Batches, Loader]:
        padding, workers = self.prepared.bundle.padding, self.config.data.workers or 0
        train = self.config.train
        task = self.prepared.task
        loader = Loader(self.prepared.train, padding, workers, task.pack if task.packs else None)
        batches = Batches(loader, train.batch, train.accumulation, train.seed)
        return batches, Loader(self.prepared.valid, padding, workers)

    def _fill_cache(self, cached: CachedBase) -> None:
        """Runs the frozen base once over all samples, in batches that depend on the data alone: a resumed run
        gets the same features to the bit."""
        module = LossModule(self.prepared.bundle.model, self.prepared.task.loss)
        self.adapted.train_mode()
        for split, loader in (("train", self.batches.loader), ("valid", self.valid)):
            plan = plan_in_order_of_cost(loader.encoded.costs, self.config.eval.batch or 1)
            if split == "train":  # one backward pass shows which outputs the head reads
                micro = loader.load(plan[-1])
                self._expect(split, micro)
                with torch.random.fork_rng(devices=[]):
                    module(to_device(micro.tensors, self.device)).total.backward()
                module.zero_grad(set_to_none=True)
            for done, micro in enumerate(loader.along(plan)):
                self.signals.poll("computing features")
                self.progress.preparing(f"features of {split}", done * len(plan[0]), len(loader.encoded))
                self._expect(split, micro)
                if cached.full:
                    limit = self.config.strategy.cache_gb  # type: ignore[union-attr]
                    self.progress.note(f"features need more than strategy.cache_gb {limit:g} GB: not cached")
                    return
                with torch.no_grad():
                    module(to_device(micro.tensors, self.device))
        self.progress.note(f"features of the frozen base: computed once, {cached.bytes / 1e6:,.1f} MB kept")

    def _check_space(self) -> None:
        trained = sum(master.numel() * master.element_size() for master in self.adapted.masters.values())
        model = (
            0
            if isinstance(self.config.strategy, Lora)
            else sum(4 * parameter.numel() for parameter in self.prepared.bundle.model.parameters())
        )
        self.folder.need_space((self.config.save.keep + 2) * 3 * trained + 3 * model + 10_000_000)

    def go(self, resume: bool) -> Report:
        start, position = self._resume() if resume else (0, Position())
        write_text(self.folder.config, configs.dump(self.config))
        if self.prepared.skipped:
            write_text(self.folder.data_report, data_report(self.prepared.skipped))
            self.progress.note(f"{len(self.prepared.skipped)} bad rows left out: {self.folder.data_report}")
        self._train(start, position)
        return self._finish()

    def _resume(self) -> tuple[int, Position]:
        """Puts everything back as it was after the newest checkpoint that verifies."""
        self.folder.must_hold(self.config)
        step, faults = self.checkpoints.newest()
        for fault in faults:
            self.progress.note(f"checkpoint unusable: {fault}")
        if step is None:
            if faults:
                raise CheckpointError(f"{self.folder.checkpoints}: none of {len(faults)} checkpoints verifies")
            self.progress.note("no checkpoint yet: starting from the beginning")
            self.folder.forget_after(0)
            return 0, Position()
        state = self.checkpoints.load(step)
        self.optimizer.load_state(state.masters, state.optimizer)
        with torch.no_grad():
            for name, buffer in self.adapted.buffers().items():
                buffer.copy_(state.buffers[name])
        self.best = _Best(**state.progress)
        self.checkpoints.restore_random(step)
        self.folder.forget_after(step)
        self.progress.note(f"resumed after step {step} of {self.steps}")
        if self.best.pending:
            self._evaluate(step)
        return step, state.position

    def _train(self, start: int, position: Position) -> None:
        module = LossModule(self.prepared.bundle.model, self.prepared.task.loss)
        if self._is_over(start):
            return
        records = train(
            module,
            self.batches,
            self.optimizer,
            start=start,
            position=position,
            set_mode=self.adapted.train_mode,
            before=partial(self._expect, "train"),
        )
        began = time.perf_counter() - self.best.seconds
        for record in records:
            self._log(record)
            if self.device.type == "cpu" and not keeps_pages() and record.step % _STEPS_BETWEEN_TRIMS == 0:
                return_free_memory()
            self.best.pending = self._is_due(record)
            self.best.seconds = time.perf_counter() - began
            try:
                if self.best.pending:
                    self._evaluate(record.step)
                self.signals.poll(f"training, after step {record.step} of {self.steps}")
            except Stopped as stopped:
                self._save(record)
                how = (
                    f"go on with the same command and --resume (checkpoint: {self.checkpoints.path(record.step)})"
                )
                raise Stopped(stopped.signum, f"{stopped}; {how}") from None
            if self._is_due(record) or record.step % (self.config.save.every or record.step + 1) == 0:
                self._save(record)
            if self._is_over(record.step):
                break

    def _log(self, record: StepRecord) -> None:
        memory = peak_memory(self.device)
        epoch = record.step / self.batches.per_epoch
        self.folder.append(
            {
                "step": record.step,
                "epoch": round(epoch, 4),
                "loss": record.loss,
                "lr": record.lr,
                "norm": record.norm,
                "taken": record.taken,
                "rows": record.rows,
                self.progress.unit: record.cost,
                "padded": record.padded_cost,
                "seconds": round(record.seconds, 5),
                "peak_memory_bytes": memory,
            }
        )
        self.progress.step(record, self.steps, epoch, memory)
        if not record.taken:
            self.progress.note(f"step {record.step}: loss or gradient not finite; no optimizer step was taken")

    def _is_due(self, record: StepRecord) -> bool:
        every = self.config.eval.every
        at_end_of_epoch = record.following.batch == 0
        return record.step == self.steps or (record.step % every == 0 if every else at_end_of_epoch)

    def _is_over(self, step: int) -> bool:
        patience = self.config.eval.patience
        if patience is not None and self.best.without_gain >= patience:
            self.progress.note(f"stopped early: no gain in {patience} evaluations")
            return True
        return step >= self.steps

    def _expect(self, split: str, micro: MicroBatch) -> None:
        """Before each forward pass: tells the feature cache what comes; evaluation ends here on a signal."""
        if split == "valid":
            self.signals.poll("evaluating")
        if self.cached is not None:
            self.cached.expect([(split, index) for index in micro.samples])

    def _evaluate(self, step: int) -> None:
        batch = self.config.eval.batch or self.config.train.batch
        metrics = evaluate(
            self.prepared.task,
            self.prepared.bundle,
            self.valid,
            batch,
            before=partial(self._expect, "valid"),
            max_rows=self.config.eval.max_rows,
        )
        value, loss = plain(metrics[self.metric.name]), plain(metrics["loss"])
        gain = self._rank(value) > self._rank(self.best.value)
        # Of equal metrics the lower loss is the better model, but patience goes by the metric alone.
        lower = -math.inf if loss is None else -loss
        before = -math.inf if self.best.loss is None else -self.best.loss
        better = gain or self.best.step == 0 or (value == self.best.value and lower > before)
        if better:
            self.best = replace(self.best, step=step, value=value, loss=loss)
        self.best.without_gain = 0 if gain else self.best.without_gain + 1
        self.best.pending = False
        self.folder.append({"step": step, "metrics": metrics})
        self.progress.evaluated(step, metrics, better)

    def _rank(self, value: float | None) -> float:
        """Higher is better; what is not finite is worse than anything."""
        return -math.inf if value is None else value if self.metric.best == "max" else -value

    def _save(self, record: StepRecord) -> None:
        self.best.note_ops()
        state = State(
            record.step,
            record.following,
            self.optimizer.masters,
            self.optimizer.state(),
            {name: buffer.clone() for name, buffer in self.adapted.buffers().items()},
            vars(self.best).copy(),
        )
        self.checkpoints.save(state, protect={self.best.step})

    def _finish(self) -> Report:
        """Writes best/ and last/ from their checkpoints, and evaluates best/ as whoever opens it will find it."""
        last = self.checkpoints.steps()[-1]
        best = self.best.step or last
        fault = verify(self.checkpoints.path(best))
        if fault and best != last:
            self.progress.note(f"checkpoint unusable: {self.checkpoints.path(best)}: {fault}; best/ is as last/")
            best = last
        self.adapted = self.cached = None  # type: ignore[assignment]
        unit, trained_in = self.progress.unit, peak_memory(self.device)
        self._export(best, self.folder.best)
        self._export(last, self.folder.last)
        model = load(self.folder.path)
        valid = plain(model.score(self.prepared.valid, self.config.eval.max_rows))
        samples = plain(model.samples(self.prepared.valid, self.config.eval.samples))
        self.best.note_ops()
        self.prepared.notes += [f"op {op}: by {by['name']}, {by['why']}" for op, by in self.best.ops.items()]
        steps, evaluations = read_records(self.folder.steps)
        seconds = sum(record["seconds"] for record in steps)
        metrics = {
            "valid": valid,
            "primary": self.metric.name,
            "best_step": best,
            "steps": last,
            "train_loss": steps[-1]["loss"],
            "rows_per_s": sum(record["rows"] for record in steps) / seconds,
            f"{unit}_per_s": sum(record[unit] for record in steps) / seconds,
            "padding": 1 - sum(record[unit] for record in steps) / sum(record["padded"] for record in steps),
            "seconds": self.best.seconds,
            "peak_memory_bytes": trained_in,
            "truncated_train": truncated_shares(self.prepared.train),
            "train_rows": self.prepared.train.usable_rows,
            "valid_rows": self.prepared.valid.usable_rows,
            "valid_rows_measured": min(
                self.prepared.valid.usable_rows, self.config.eval.max_rows or self.prepared.valid.usable_rows
            ),
            "samples": samples,
            "ops": self.best.ops,
        }
        warnings = dangers(steps, evaluations)
        configs_text = configs.dump(self.config)
        write_text(self.folder.metrics, json.dumps(plain(metrics), indent=2))
        title = f"{self.config.task}: {self.config.model}, {self.config.strategy.kind}"
        write_text(
            self.folder.report,
            render(title, metrics, steps, evaluations, warnings, self.prepared.notes, configs_text),
        )
        for name, folder in (("best", self.folder.best), ("last", self.folder.last)):
            write_text(
                folder / "README.md",
                model_card(self.config, valid if name == "best" else {}, self.prepared.labels),
            )
        for warning in warnings:
            self.progress.note(f"warning: {warning}")
        return Report(self.folder.path, metrics, warnings)

    def _export(self, step: int, folder: Path) -> None:
        state = self.checkpoints.load(step)
        prepared = self.prepared
        bundle = build_bundle(prepared.task, source_of(self.config), prepared.labels, self.config.train.seed)
        card = model_card(self.config, {}, prepared.labels)
        try:
            if isinstance(self.config.strategy, Lora):
                save_adapter(bundle, {**state.buffers, **state.masters}, folder, self.config, card, self.disk)
            else:
                install(bundle, state.masters, state.buffers)
                save_model(bundle, folder, card, self.disk)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{folder}: the model can't be written: {disk_fault(error)}; mend that and finish with --resume"
            ) from error
