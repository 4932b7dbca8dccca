"""Head and strategy: makes a bundle's model trainable in the way that was asked for.

Modules are replaced on the instance, by type; no package is patched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttune import attention, deformable
from fasttune.config import Full, Head, Lora
from fasttune.convolutions import lay_out, replace_batch_norms
from fasttune.errors import ConfigError, ModelError, nearest
from fasttune.features import base_module
from fasttune.ops import dropout, lora_linear
from fasttune.task import Bundle

Strategy = Full | Head | Lora
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class CounterDropout(nn.Module):
    """`fasttune.ops.dropout` in the place of `nn.Dropout`: the mask is drawn again in the backward, not stored."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update: y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ.

    base: nn.Linear [out, in], or transformers' Conv1D, whose weight is [in, out]. lora_a: [rank, in], uniform as
    nn.Linear's own; lora_b: [out, rank], zero, so that training starts at the pretrained model (arXiv 2106.09685).
    """

    def __init__(self, base: nn.Module, config: Lora):
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.base = base
        self.transposed = not isinstance(base, nn.Linear)
        out_features, in_features = reversed(weight.shape) if self.transposed else weight.shape
        self.scale = lora_scale(config)
        self.dropout = config.dropout
        self.lora_a = nn.Parameter(torch.empty(config.rank, in_features, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, config.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    # Some models ask a layer for its weight's dtype or device.
    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        return lora_linear(
            x,
            weight,
            self.bias,
            self.lora_a,
            self.lora_b,
            scale=self.scale,
            dropout=self.dropout,
            training=self.training,
        )

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with the update added to its weight, in fp32 before the one rounding."""
        update = self.scale * (self.lora_b.float() @ self.lora_a.float())
        weight = self.weight.float() + (update.t() if self.transposed else update)
        self.weight.copy_(weight)
        return self.base


def lora_scale(config: Lora) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora; alpha is twice the rank if not set."""
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    return alpha / math.sqrt(config.rank) if config.rslora else alpha / config.rank


def inject_lora(bundle: Bundle, config: Lora) -> tuple[str, ...]:
    """Puts a LoRALinear around each target. Returns their names. Raises ConfigError or ModelError."""
    names = lora_target_names(bundle, config)
    for name in names:
        parent, _, child = name.rpartition(".")
        module = bundle.model.get_submodule(parent)
        setattr(module, child, LoRALinear(getattr(module, child), config))
    return names


def lora_target_names(bundle: Bundle, config: Lora) -> tuple[str, ...]:
    """Full names of the layers to adapt: those that the config names by their last parts, else the task's."""
    if config.targets is None:
        if not bundle.lora_targets:
            name = type(bundle.model).__name__
            raise ModelError(f"{name} has no linear layers that LoRA could adapt; use strategy full or head")
        return bundle.lora_targets
    linear = [
        name for name, module in bundle.model.named_modules() if _is_linear(module) and not _in_head(name, bundle)
    ]
    chosen: list[str] = []
    for target in config.targets:
        matches = [name for name in linear if name == target or name.endswith("." + target)]
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"strategy.targets: no linear layer of the base is named {target!r}.{nearest(target, known)} "
                f"Known: {', '.join(known)}"
            )
        chosen += matches
    return tuple(dict.fromkeys(chosen))


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _in_head(name: str, bundle: Bundle) -> bool:
    return any(name == head or name.startswith(head + ".") for head in bundle.head)


def merge_lora(model: nn.Module) -> None:
    """Replaces every LoRALinear by its base layer with the update merged in."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merged())


def native_precision(device: torch.device) -> str:
    """bf16 where the machine multiplies it natively (NVIDIA sm80 and up, AVX512-BF16 or AMX), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32"
    # Public in torch 2.13 only (torch.cpu.get_capabilities); these two are older and the same test.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


@dataclass
class Adapted:
    """A model ready for training.

    trained: parameters by name. masters: their fp32 values by name, from before the cast to the compute type.
    attention: which implementation computes attention, and why; deformable attention too, where there is any.
    layout: of the weights of convolutions, and why; None for a model without.
    """

    bundle: Bundle
    trained: dict[str, nn.Parameter]
    masters: dict[str, Tensor]
    strategy: Strategy
    attention: str
    layout: str | None = None

    def train_mode(self) -> None:
        """Dropout on where something is trained; a base that is wholly frozen stays in eval mode."""
        model = self.bundle.model
        model.train()
        if not isinstance(self.strategy, Full):  # frozen batch norms keep their running statistics
            for name, module in model.named_modules():
                if isinstance(module, _BATCH_NORMS) and not _in_head(name, self.bundle):
                    module.eval()
        if isinstance(self.strategy, Head):
            base = base_module(self.bundle)
            (base[1] if base else model).eval()
            for name in self.bundle.head:
                model.get_submodule(name).train()

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers that training changes, by name: those of the head, and with strategy full all."""
        model = self.bundle.model
        kept = model.state_dict(keep_vars=True)
        return {
            name: buffer
            for name, buffer in model.named_buffers()
            if name in kept and (isinstance(self.strategy, Full) or _in_head(name, self.bundle))
        }


def adapt(
    bundle: Bundle,
    strategy: Strategy,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention_implementation: str = "auto",
    checkpointing: bool = False,
) -> Adapted:
    """Freezes, injects and casts: afterwards only what the strategy trains requires a gradient.

    dtype: the compute type. Batch norms keep fp32, whose running statistics bf16 would swallow; so do all buffers.
    Raises ModelError or ConfigError if the strategy doesn't fit the model.
    """
    model, device = bundle.model, torch.device(device)
    if isinstance(strategy, Lora):
        inject_lora(bundle, strategy)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, bundle, strategy))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ModelError(f"{type(model).__name__}: strategy {strategy.kind} leaves nothing to train")
    replace_dropout(model)
    replace_batch_norms(model)
    model.to(device)
    layout = lay_out(model, dtype, device)  # before the masters, which have to have their parameters' strides
    masters = {name: p.detach().to(torch.float32, copy=True) for name, p in trained.items()}
    cast(model, dtype)
    if checkpointing:
        _checkpoint_blocks(model)
    said = (
        attention.choose(model, attention_implementation, dtype, device),
        deformable.replace(model, dtype, device),
    )
    return Adapted(bundle, trained, masters, strategy, "; ".join(filter(None, said)), layout)


def _is_trained(name: str, bundle: Bundle, strategy: Strategy) -> bool:
    if isinstance(strategy, Full):
        return True
    if _in_head(name, bundle):
        return bundle.head_is_new or isinstance(strategy, Head)
    return isinstance(strategy, Lora) and name.rpartition(".")[2] in ("lora_a", "lora_b")


def replace_dropout(model: nn.Module) -> None:
    """`nn.Dropout` becomes CounterDropout, on this instance."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CounterDropout(child.p))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Floating-point parameters to the compute type, and the inputs of the model's forward with them."""
    for module in model.modules():
        if not isinstance(module, _BATCH_NORMS):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)

    def cast_inputs(_: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        return tuple(map(to_dtype, arguments)), {name: to_dtype(value) for name, value in named.items()}

    def to_dtype(value: object) -> object:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    model.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _checkpoint_blocks(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(f"{type(model).__name__} does not support train.activation_checkpointing")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


def block_depths(bundle: Bundle, names: Iterable[str]) -> dict[str, int]:
    """How far each parameter stands below the head: 0 in the head and above the last block, 1 in the last block,
    len(blocks) in the first, len(blocks) + 1 in the embeddings before it."""
    blocks: Sequence[str] = bundle.blocks
    order = {name: i for i, (name, _) in enumerate(bundle.model.named_parameters())}
    inside = [i for name, i in order.items() if any(name.startswith(block + ".") for block in blocks)]
    last = max(inside, default=-1)
    depths = {}
    for name in names:
        block = next((i for i, block in enumerate(blocks) if name.startswith(block + ".")), None)
        if block is not None:
            depths[name] = len(blocks) - block
        elif _in_head(name, bundle) or 0 <= last < order[name]:  # a final norm, a pooler
            depths[name] = 0
        else:
            depths[name] = len(blocks) + 1
    return depths
