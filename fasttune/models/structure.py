"""Where head, repeated layers and linear layers of a transformers model are, found from its modules."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# Their attention reads the projections' weights itself, past the modules' forward: an adapter put around such a
# module would be trained on nothing.
_READS_WEIGHTS = ("WavLMAttention",)


def base_name(model: Any) -> str:
    """The child that holds the pretrained backbone: what transformers names, else `backbone` (UperNet's head may
    be larger), else the largest; "", the model itself, where encoder and decoder are children of their own
    (T5)."""
    stated = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    for name in (stated, "backbone"):
        if name in children:
            return name
    if getattr(model.config, "is_encoder_decoder", False) and {"encoder", "decoder"} <= children.keys():
        return ""
    return max(children, key=lambda name: _size(children[name]))


def head_modules(model: nn.Module, base: str) -> list[str]:
    """Top-level modules with parameters outside the backbone; the linear ones, if the model itself is that. A timm
    model has its classifier inside."""
    if not base:
        return [name for name, child in model.named_children() if isinstance(child, nn.Linear)]
    names = [name for name, child in model.named_children() if name != base and _size(child)]
    inner = getattr(model, base)
    if not names and hasattr(inner, "get_classifier"):
        classifier = inner.get_classifier()
        names = [f"{base}.{name}" for name, module in inner.named_modules() if module is classifier]
    return names


def block_names(model: Any, base: str) -> tuple[str, ...]:
    """The repeated layers of the backbone in depth order; the stages of a hierarchical one.

    They are the children of its outermost ModuleList with the most parameters (Sequential, if it has no
    ModuleList); of both stacks, encoder first, for an encoder and decoder.
    """
    stacks = ("encoder", "decoder")
    # T5 has no module around them; Whisper's classifier has an encoder alone.
    two = base in stacks and all(isinstance(getattr(model, name, None), nn.Module) for name in stacks)
    lists: dict[str, nn.Module] = {}
    for name in stacks if two else (base,):
        part = model.get_submodule(name)
        lists |= _outermost(part, name, nn.ModuleList) or _outermost(part, name, nn.Sequential)
    if not lists:
        return ()
    largest = max(lists, key=lambda name: _size(lists[name]))
    chosen = [largest]
    if getattr(model.config, "is_encoder_decoder", False):
        chosen = [name for name in lists if name.rpartition(".")[2] == largest.rpartition(".")[2]]
    return tuple(f"{name}.{child}" for name in chosen for child, _ in lists[name].named_children())


def linear_names(model: nn.Module, blocks: Iterable[str], head: Iterable[str]) -> tuple[str, ...]:
    """All linear layers (nn.Linear, transformers' Conv1D) inside the blocks, without those of the head."""
    outside = tuple(head)
    names = []
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            # By exact type: subclasses such as the out-projection of nn.MultiheadAttention are never called.
            if type(module) not in (nn.Linear, Conv1D) or _inside(name, outside):
                continue
            if type(model.get_submodule(name.rpartition(".")[0])).__name__ not in _READS_WEIGHTS:
                names.append(name)
    return tuple(names)


def _outermost(module: nn.Module, name: str, kind: type[nn.Module]) -> dict[str, nn.Module]:
    if isinstance(module, kind):
        return {name: module} if _size(module) else {}
    found: dict[str, nn.Module] = {}
    for child_name, child in module.named_children():
        found |= _outermost(child, f"{name}.{child_name}" if name else child_name, kind)
    return found


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
