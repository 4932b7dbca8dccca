"""The run file: frozen models, unknown keys forbidden, alternatives as types.

`load(path, overrides)` reads YAML and `--set section.key=value`; `resolve(config, ...)` writes every default out
that depends on the strategy or the machine. Every error names the key, its line, and the nearest right key.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fasttune.errors import ConfigError
from fasttune.explain import explain


class Section(BaseModel):
    """A part of the run file: immutable, and a key that it doesn't know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


SHARE_HELD_OUT = 0.1


def _share_or_path(value: float | str) -> float | str:
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"expected a path, or a share of train between 0 and 1, found {value:g}")
    return value


def _kind_or(default: str) -> BeforeValidator:
    """`strategy: lora` is short for `strategy: {kind: lora}`; settings without a kind are the default's."""

    def name_kind(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(name_kind)


class Full(Section):
    """Trains every weight: the strongest and costliest; may forget what the model knew."""

    kind: Literal["full"] = "full"
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate factor from each block to the one below it (layer-wise decay); 1 = the same everywhere."""
    gradual_unfreezing: float = Field(0.0, ge=0, lt=1)
    """Share of the run over which blocks are unfrozen one by one, the last one first (ULMFiT, arXiv 1801.06146);
    0 = all from the start."""


class Head(Section):
    """Trains the new head on a frozen base: cheap and safe."""

    kind: Literal["head"] = "head"
    cache_gb: float = Field(2.0, ge=0)
    """Memory, in GB, for features of the frozen base, computed once; 0 = compute them in every epoch."""


class Lora(Section):
    """Trains low-rank matrices beside frozen linear layers, and the new head (LoRA, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    """Width of the low-rank matrices."""
    alpha: float | None = Field(None, gt=0)
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora. Default: twice the rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the input of the low-rank matrices."""
    targets: tuple[str, ...] | None = None
    """Layers to adapt, by full name or its last parts ("query", "attention.query"). Default: all that the task
    names, as a rule every linear layer of the base."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps high ranks stable (rsLoRA, arXiv 2312.03732)."""


Strategy = Annotated[Annotated[Full | Head | Lora, Field(discriminator="kind")], _kind_or("lora")]


class AdamW(Section):
    """AdamW, torch's fused one (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and norms."""


class SGD(Section):
    """Stochastic gradient descent, torch's fused one."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    """Not applied to biases and norms."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


Optimizer = Annotated[Annotated[AdamW | SGD, Field(discriminator="kind")], _kind_or("adamw")]


class Schedule(Section):
    """How the learning rate goes: up over the warm-up, then down to `final` times its peak."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.06, ge=0)
    """Below 1: the share of all steps; from 1 on: steps."""
    final: float = Field(0.0, ge=0, le=1)
    """Share of the peak that is left at the last step (linear, cosine)."""


class Data(Section):
    train: str
    """csv, tsv, json, jsonl, parquet or arrow file, a folder of images or audio, a layout that the task knows
    (`path`, `path:split`), or a hub id (`id`, `id:split`, `id:config:split`)."""
    valid: Annotated[float | str, AfterValidator(_share_or_path)] | None = None
    """A path as for train, or the share held out of train. Default: the validation split beside train, where train
    is one split of a layout that the task knows; else 0.1."""
    root: str | None = None
    """The folder that paths of images and audio are relative to, and must stay in. Default: the table's own."""
    columns: dict[str, str] = {}
    """Column of the data by role of the task, where names differ from the roles and their aliases; "a.b" is the
    field b of a column of mappings."""
    on_error: Literal["stop", "skip"] = "stop"
    """What bad rows do: stop the run before its first step, or be left out and listed in data_report.jsonl."""
    max_skip: float = Field(0.01, ge=0, le=1)
    """With on_error skip: the share of rows that may be left out at most."""
    workers: int | None = Field(None, ge=0)
    """Processes that decode images and audio; 0 = decode in the main process. Text needs none. Default: one less
    than the cores, four at most."""
    max_pixels: int = Field(178_956_970, ge=1)
    """An image with more pixels is a bad row (decompression bombs)."""
    max_audio_seconds: float = Field(3600.0, gt=0)
    """A longer recording is a bad row."""


class Train(Section):
    epochs: float = Field(3.0, gt=0)
    """Passes over train; fractions are allowed."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; takes the place of epochs."""
    batch: int = Field(32, ge=1)
    """Rows an optimizer step, over all micro-batches."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches that one batch is cut into, to save memory; the gradient is the same to rounding."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate. Default by strategy: full 5e-5, head 5e-3, lora 1e-3 for a model of hidden size 768;
    otherwise times (768 / hidden size) ** 0.775."""
    head_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the head. Default: 10 x lr for full where the head is new, else lr."""
    optimizer: Optimizer = AdamW()
    schedule: Annotated[Schedule, _kind_or("linear")] = Schedule()
    clip: float | None = Field(None, ge=0)
    """Largest norm of the gradient; 0 = no clipping. Default: 1, or what such models are trained with (0.1 for
    DETR's family)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; auto is bf16 where the machine has it natively. What is trained keeps fp32 master weights."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How attention is computed; auto is what is fastest for device and precision, and the log says what."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and compute it again in the backward pass: less memory, more time."""
    seed: int = Field(17, ge=0, lt=2**63)

    def total_steps(self, per_epoch: int) -> int:
        """Optimizer steps of a run whose epochs have `per_epoch`."""
        return self.steps or math.ceil(self.epochs * per_epoch)

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> Train:
        if self.accumulation > self.batch:
            raise ValueError(f"accumulation {self.accumulation} is more than the {self.batch} rows of a batch")
        return self


class Eval(Section):
    every: int | None = Field(None, ge=1)
    """Optimizer steps between two evaluations. Default: once an epoch."""
    batch: int | None = Field(None, ge=1)
    """Rows a batch. Default: twice the rows of a training micro-batch."""
    max_rows: int | None = Field(None, ge=1)
    """Evaluate on at most this many rows of valid, spread evenly: generation is slow. Default: all."""
    samples: int = Field(3, ge=0)
    """Rows of valid whose predictions the report shows."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better primary metric. Default: never."""


class Save(Section):
    every: int | None = Field(None, ge=1)
    """Optimizer steps between two checkpoints, beside those at each evaluation. Default: those alone."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept; older ones are removed after a newer one is safe."""


class RunConfig(Section):
    """The whole run file."""

    task: str
    """The task's name, or distribution:name where two distributions claim one."""
    model: str
    """A hub id or a local directory."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: the architecture alone, trained from scratch."""
    options: dict[str, Any] = {}
    """The task's own settings; `fasttune tasks NAME` lists them."""
    data: Data
    strategy: Strategy = Lora()
    train: Train = Train()
    eval: Eval = Eval()
    save: Save = Save()
    output: str = ""
    """The run folder. Default: runs/TASK-MODEL."""
    provenance: dict[str, Any] = {}
    """Written into the resolved file: package versions, the plugin, the data's fingerprint."""


_KINDS = {"strategy": "lora", "optimizer": "adamw", "schedule": "linear"}
_LR_AT_768 = {"full": 5e-5, "head": 5e-3, "lora": 1e-3}
_MOST_WORKERS = 4
_LR_EXPONENT = 0.775  # wider models want smaller steps


def resolve(config: RunConfig, *, precision: str) -> RunConfig:
    """The config with every default written out but those that depend on the model (`resolve_rates`).

    precision: what `auto` means on this machine.
    """
    strategy, train = config.strategy, config.train
    if isinstance(strategy, Lora) and strategy.alpha is None:
        strategy = strategy.model_copy(update={"alpha": 2.0 * strategy.rank})
    if train.precision != "auto":
        precision = train.precision
    batch = config.eval.batch or 2 * -(-train.batch // train.accumulation)
    workers = config.data.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(_MOST_WORKERS, cores - 1)
    name = re.sub(r"[^\w.-]+", "-", Path(config.model).name or config.model)
    return config.model_copy(
        update={
            "model": _home(config.model),
            "strategy": strategy,
            "train": train.model_copy(update={"precision": precision}),
            "eval": config.eval.model_copy(update={"batch": batch}),
            "data": config.data.model_copy(update={"workers": workers}),
            "output": _home(config.output) or f"runs/{config.task.rpartition(':')[2]}-{name}",
        }
    )


def resolve_rates(
    config: RunConfig, width: int | None, fresh_head: bool = True, clip: float | None = None
) -> RunConfig:
    """The config with its learning rates and clipping written out. width: the model's hidden size, None if it has
    no one. fresh_head: whether the head starts from random weights; a pretrained one learns no faster than the
    rest. clip: what such models are trained with, `Bundle.clip`."""
    kind, train = config.strategy.kind, config.train
    lr = train.lr or float(f"{_LR_AT_768[kind] * (768 / (width or 768)) ** _LR_EXPONENT:.2g}")
    head_lr = train.head_lr or (10 * lr if kind == "full" and fresh_head else lr)
    if train.clip is not None or clip is None:
        clip = 1.0 if train.clip is None else train.clip
    rates = {"lr": lr, "head_lr": head_lr, "clip": clip}
    return config.model_copy(update={"train": train.model_copy(update=rates)})


def _home(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-4 is a number (YAML 1.1 wants 2.0e-4) and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # the base class words that error
                break
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The value and its tree of nodes, which knows the lines."""
    try:
        return yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file. overrides: "section.key=value" texts. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"no run file {path}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    values, node = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as task, model and data, found {type(values).__name__}")
    return build(values, overrides, where=str(path), node=node)


def build(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "settings", node: Any = None
) -> RunConfig:
    """A RunConfig from nested mappings and "section.key=value" texts. Raises ConfigError."""
    merged = _copy(values)
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, merged, where, node)) from error


def validate_options(model: type[BaseModel], values: Mapping[str, Any], task: str) -> Any:
    """The task's own settings. Raises ConfigError with the nearest key."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, model, values, f"options of {task}", None)) from error


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    section = values
    for part in parts[:-1]:
        inner = section.setdefault(part, {})
        if isinstance(inner, str) and part in _KINDS:  # `strategy: lora` and `--set strategy.rank=8`
            inner = section[part] = {"kind": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {part} is a single value and has no keys")
        section = inner
    value = _parse_yaml(text, f"--set {override!r}")[0] if text else ""
    alternatives = parts[-1] == "kind" and parts[-2:-1] in (["strategy"], ["optimizer"])
    if alternatives and section.get("kind", _KINDS[parts[-2]]) != value:
        section.clear()  # the settings of the kind that is not wanted
    section[parts[-1]] = value


def dump(config: RunConfig) -> str:
    """The config as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
