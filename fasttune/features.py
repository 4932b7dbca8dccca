"""Features of a frozen base, computed once: the base's output is kept a sample and handed out again.

For the head strategy, where nothing random stands before the head: epochs after the first run the head alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.task import Bundle


def base_module(bundle: Bundle) -> tuple[str, nn.Module] | None:
    """Name and module of the pretrained base, if the model has one that holds no part of the head."""
    name = getattr(bundle.model, "base_model_prefix", "")
    base = getattr(bundle.model, name, None) if name else None
    if not isinstance(base, nn.Module) or base is bundle.model:
        return None
    own = {id(parameter) for parameter in base.parameters()}
    for head in bundle.head:
        inside = head == name or head.startswith(name + ".")
        # A tied output projection stands outside, and trains the embeddings inside.
        if inside or any(id(p) in own for p in bundle.model.get_submodule(head).parameters()):
            return None
    return name, base


class CachedBase(nn.Module):
    """Stands in the place of a frozen base module.

    Call `expect(keys)` before each forward pass of the model: with keys that are all known the base is not run.
    Only the output fields that the head's gradient reaches are kept. Padding comes back as zeros, which a head
    that heeds the attention mask doesn't see.
    """

    def __init__(self, base: nn.Module, limit_bytes: float):
        super().__init__()
        self.base, self.limit = base, limit_bytes
        self.full = False
        self.bytes = 0
        self._keys: Sequence[Hashable] = ()
        self._store: dict[Hashable, dict[str, Tensor]] = {}
        self._kind: Any = None
        self._order: list[str] = []
        self._used: set[str] | None = None
        self._probes: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the model asks of its base: config, dtype, ...
            return getattr(super().__getattr__("base"), name)

    def expect(self, keys: Sequence[Hashable]) -> None:
        """keys: one a sample of the next batch, in its order."""
        self._learn_what_is_used()
        self._keys = keys

    def forward(self, *arguments: Any, **named: Any) -> Any:
        keys, self._keys = self._keys, ()
        if keys and all(key in self._store for key in keys):
            return self._rebuild([self._store[key] for key in keys])
        with torch.no_grad():
            output = self.base(*arguments, **named)
        if not keys or self.full or not hasattr(output, "items"):
            return output
        self._kind, self._order = type(output), list(output)
        fields = {name: value for name, value in output.items() if self._is_kept(name, value, len(keys))}
        self._keep(keys, fields, named.get("attention_mask"))
        if self._used is None and torch.is_grad_enabled():
            self._probes = {name: value.detach().requires_grad_() for name, value in fields.items()}
            output = self._kind(**{**output, **self._probes})
        return output

    def _is_kept(self, name: str, value: Any, rows: int) -> bool:
        wanted = self._used is None or name in self._used
        return wanted and isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows

    def _keep(self, keys: Sequence[Hashable], fields: dict[str, Tensor], mask: Tensor | None) -> None:
        lengths = mask.sum(dim=1).tolist() if mask is not None and mask.dim() == 2 else None
        for row, key in enumerate(keys):
            kept = {}
            for name, value in fields.items():
                is_sequence = lengths is not None and mask is not None and value.shape[1:2] == mask.shape[1:]
                piece = value[row, : int(lengths[row])] if is_sequence and lengths else value[row]
                kept[name] = piece.detach().clone()
            self._store[key] = kept
            self.bytes += sum(piece.numel() * piece.element_size() for piece in kept.values())
        self._heed_the_limit()

    def _heed_the_limit(self) -> None:
        if self.bytes > self.limit and self._used is not None:
            self.full = True
            self._store.clear()

    def _learn_what_is_used(self) -> None:
        """After the first backward pass: fields without a gradient are read by no head, and dropped."""
        if self._used is not None or not any(probe.grad is not None for probe in self._probes.values()):
            return
        self._used = {name for name, probe in self._probes.items() if probe.grad is not None}
        self._probes = {}
        self._store = {
            key: {name: piece for name, piece in kept.items() if name in self._used}
            for key, kept in self._store.items()
        }
        pieces = (piece for kept in self._store.values() for piece in kept.values())
        self.bytes = sum(piece.numel() * piece.element_size() for piece in pieces)
        self._heed_the_limit()

    def _rebuild(self, rows: list[dict[str, Tensor]]) -> Any:
        # Fields that no head reads stay as empty ones: models also take their base's output by position.
        fields = {name: torch.empty(0) for name in self._order}
        for name in rows[0]:
            pieces = [row[name] for row in rows]
            if len({piece.shape for piece in pieces}) > 1:
                fields[name] = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
            else:
                fields[name] = torch.stack(pieces)
        return self._kind(**fields)


def _writes_beside_what_it_reads(bundle: Bundle) -> bool:
    """An encoder-decoder with its own head: its features are as long as the batch's longest target, whatever the
    attention mask of its source says."""
    config: Any = getattr(bundle.model, "config", None)
    return not bundle.head_is_new and getattr(config, "is_encoder_decoder", False)


def cache_features(bundle: Bundle, limit_gb: float) -> CachedBase | None:
    """Puts a CachedBase in the place of the model's base; None if the model has no base apart from its head,
    or one whose features have no length of their own."""
    found = base_module(bundle)
    if found is None or limit_gb <= 0 or not bundle.cacheable or _writes_beside_what_it_reads(bundle):
        return None
    name, base = found
    cached = CachedBase(base, limit_gb * 1e9)
    setattr(bundle.model, name, cached)
    return cached
