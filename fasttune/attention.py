"""Attention by plain matrix products with our own dropout, entered in transformers' registry under `fasttune`.

On CPU in bf16 the backward of torch's fused attention is up to five times slower than three plain operations,
and dropout inside attention forces its slow path and a stored mask (measured; see bench/RESULTS.md).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops import attention

NAME = "fasttune"
_PLAIN_ARGUMENTS = frozenset(
    {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "head_mask", "kwargs"}
)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(query keyᵀ · scaling + mask) value, by `fasttune.ops.attention`.

    query: [rows, heads, queries, width]. key, value: [rows, heads or fewer, keys, width].
    attention_mask: additive, broadcast to [rows, heads, queries, at least keys]. scaling: width ** -0.5 if None.
    Returns the result [rows, queries, heads, width]; weights never exist as a whole.
    """
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, mask, scale=scale, dropout=dropout, training=module.training), None


def choose(model: Any, wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """Sets the model's attention implementation and says which, and why.

    wanted: "auto", or a name that transformers knows. auto is plain attention on CPU in bf16 where the model's own
    plain attention is the textbook one; otherwise what transformers chose.
    """
    config = getattr(model, "config", None)
    current = getattr(config, "_attn_implementation", None)
    if current is None:
        return "the model's own (no choice)"
    if wanted != "auto":
        model.set_attn_implementation(wanted)
        return f"{wanted} (asked for)"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"{current} (transformers' choice)"
    if not _is_textbook(model):
        return f"{current} (the model's own is not the textbook one, or not exchangeable)"
    _register()
    model.set_attn_implementation(NAME)
    return f"{NAME} (plain products, the fastest on CPU in bf16)"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def _is_textbook(model: nn.Module) -> bool:
    """Whether the model goes through transformers' attention registry with no arguments but the usual ones.

    Soft caps, sinks and position biases are arguments of the eager function of the model's own module.
    """
    eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    supported = getattr(model, "_can_set_attn_implementation", lambda: False)()
    if eager is None or not supported:
        return False
    return set(inspect.signature(eager).parameters) <= _PLAIN_ARGUMENTS
