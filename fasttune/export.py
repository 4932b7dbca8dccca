"""What a run leaves behind: a plain transformers folder, or a PEFT adapter folder; and the way back from both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasttune.adapt import LoRALinear, inject_lora, lora_target_names
from fasttune.checkpoint import Disk, replace_folder
from fasttune.config import Lora, RunConfig
from fasttune.errors import ModelError
from fasttune.task import Bundle

_PEFT_PREFIX = "base_model.model."
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_TASK_TYPES = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}


@torch.no_grad()
def install(bundle: Bundle, trained: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copies trained weights and buffers, by name, into a freshly built bundle, rounded to its own type."""
    own = dict(bundle.model.named_parameters()) | dict(bundle.model.named_buffers())
    for name, value in {**buffers, **trained}.items():
        own[name].copy_(value)


def save_model(bundle: Bundle, folder: Path, card: str, disk: Disk) -> None:
    """A folder that `from_pretrained` and `transformers.pipeline` open: weights, config, processor, model card."""
    staged = _staged(folder, disk)
    model: Any = bundle.model
    with _no_progress_bars():
        model.save_pretrained(staged)
    _save_processor(bundle, staged, card, disk)
    replace_folder(staged, folder, disk)


def save_adapter(
    bundle: Bundle, trained: Mapping[str, Tensor], folder: Path, config: RunConfig, card: str, disk: Disk
) -> None:
    """A folder in PEFT's format: the low-rank matrices and the head, in fp32, beside the processor.

    bundle: freshly built, not adapted. trained: fp32 values by name in the adapted model.
    """
    strategy = config.strategy
    assert isinstance(strategy, Lora)
    staged = _staged(folder, disk)
    named = {**trained, **_tied_names(bundle, trained)}
    tensors = {_peft_name(name): value.detach().cpu().contiguous() for name, value in named.items()}
    save_file(tensors, staged / _ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base, local = config.model, Path(config.model)
    record = {
        "peft_type": "LORA",
        "task_type": _peft_task_type(config, bundle),
        "base_model_name_or_path": str(local.resolve()) if local.is_dir() else base,
        "r": strategy.rank,
        "lora_alpha": strategy.alpha,
        "lora_dropout": strategy.dropout,
        "use_rslora": strategy.rslora,
        "target_modules": list(lora_target_names(bundle, strategy)),
        "modules_to_save": (list(bundle.head) or None) if bundle.head_is_new else None,
        "fan_in_fan_out": _is_transposed(bundle, strategy),
        "bias": "none",
        "inference_mode": True,
    }
    disk.write(staged / "adapter_config.json", json.dumps(record, indent=2).encode())
    model: Any = bundle.model
    if hasattr(getattr(model, "config", None), "save_pretrained"):  # it names the classes
        model.config.save_pretrained(staged)
    if getattr(model, "generation_config", None) is not None:  # how it writes: `generate` of the base takes it
        model.generation_config.save_pretrained(staged)
    _save_processor(bundle, staged, card, disk)
    replace_folder(staged, folder, disk)


def _tied_names(bundle: Bundle, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of trained weights that two modules of the head share, under their second names: PEFT looks for every
    module of modules_to_save by its own name."""
    first = {id(parameter): name for name, parameter in bundle.model.named_parameters()}
    everything = bundle.model.named_parameters(remove_duplicate=False)
    second = {name: first[id(parameter)] for name, parameter in everything if first[id(parameter)] != name}
    return {
        name: trained[other].clone()
        for name, other in second.items()
        if other in trained and any(name.startswith(f"{head}.") for head in bundle.head)
    }


def load_adapter(bundle: Bundle, folder: Path, config: Lora) -> None:
    """Injects LoRA into a freshly built bundle, with the weights that `save_adapter` wrote.

    Raises ModelError if the adapter doesn't fit the model."""
    inject_lora(bundle, config)
    weights = load_file(folder / _ADAPTER_WEIGHTS)
    own = dict(bundle.model.named_parameters(remove_duplicate=False)) | dict(bundle.model.named_buffers())
    wanted = {name for name in own if name.rpartition(".")[2] in ("lora_a", "lora_b")}
    for name, value in weights.items():
        ours = _own_name(name)
        if ours not in own or own[ours].shape != value.shape:
            raise ModelError(f"{folder}: the adapter's {name} {list(value.shape)} has no place in the base model")
        own[ours].data.copy_(value)
        wanted.discard(ours)
    if wanted:
        raise ModelError(f"{folder}: the adapter lacks {len(wanted)} matrices, the first: {sorted(wanted)[0]}")


def _peft_task_type(config: RunConfig, bundle: Bundle) -> str | None:
    """PEFT's name for what a model is for. A task that writes text may do so with either kind of model."""
    if bundle.writes_text:
        return "SEQ_2_SEQ_LM" if bundle.model.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
    kind = _PEFT_TASK_TYPES.get(config.task.rpartition(":")[2])
    # PeftModelForQuestionAnswering (peft 0.21) keeps token_type_ids from the model, which then computes something
    # else. An adapter without a task type is opened by PeftModel, which hands everything on.
    if kind == "QUESTION_ANS" and "token_type_ids" in getattr(bundle.processor, "model_input_names", ()):
        return None
    return kind


def _peft_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    leaf = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}.get(leaf, leaf)
    return f"{_PEFT_PREFIX}{stem}.{leaf}"


def _own_name(name: str) -> str:
    name = name.removeprefix(_PEFT_PREFIX)
    return name.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")


def _is_transposed(bundle: Bundle, config: Lora) -> bool:
    """Whether the adapted layers keep their weight as [in, out] (transformers' Conv1D)."""
    module = bundle.model.get_submodule(lora_target_names(bundle, config)[0])
    return module.transposed if isinstance(module, LoRALinear) else not isinstance(module, torch.nn.Linear)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _staged(folder: Path, disk: Disk) -> Path:
    staged = folder.with_name(f".staging-{folder.name}")
    if staged.exists():
        disk.remove(staged)
    disk.make_folder(staged)
    return staged


def _save_processor(bundle: Bundle, folder: Path, card: str, disk: Disk) -> None:
    if hasattr(bundle.processor, "save_pretrained"):
        bundle.processor.save_pretrained(folder)
    disk.write(folder / "README.md", card.encode())


def model_card(config: RunConfig, metrics: Mapping[str, Any], labels: list[str]) -> str:
    """A model card: what it was trained from and on, and the numbers it reached."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in numbers.items())
    base = Path(config.model).name if Path(config.model).is_dir() else config.model
    library = "peft" if isinstance(config.strategy, Lora) else "transformers"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: {config.task.rpartition(':')[2]}\nbase_model: {base}\n"
        f"tags: [fasttune]\n---\n\n# {base}, fine-tuned for {config.task}\n\n"
        f"Strategy {config.strategy.kind}, {config.train.epochs:g} epochs, batch {config.train.batch}, "
        f"learning rate {config.train.lr:g}, seed {config.train.seed}.\n"
        + (f"Classes: {', '.join(labels)}.\n" if labels else "")
        + f"\n| on valid | |\n|---|---|\n{rows}\n"
    )
