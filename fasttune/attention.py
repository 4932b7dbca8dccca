"""`fasttune.ops.attention` in transformers' registry under `fasttune`, and the choice between it and the others.

Milliseconds, forward + backward, on two cores with AVX512-BF16; rows, heads, length, width; p: attention dropout.
sdpa is torch's fused attention: its backward is slow in bf16, and dropout forces it to its slow path.

|                       | ours | sdpa |   p = 0.1: ours | sdpa |
|-----------------------|------|------|-----------------|------|
| 32, 12, 90, 32   bf16 |    4 |   42 |               5 |   37 |
| 32, 12, 96, 32   bf16 |    4 |   39 |               5 |   40 |
| 8, 12, 256, 64   bf16 |    9 |   35 |              11 |   74 |
| 2, 12, 1024, 64  bf16 |   36 |   95 |              42 |  296 |
| 1, 12, 2048, 64  bf16 |   73 |  200 |              84 |  567 |
| 32, 12, 90, 32   fp32 |    6 |   18 |               7 |   35 |
| 32, 12, 96, 32   fp32 |    7 |   16 |               7 |   38 |
| 8, 12, 256, 64   fp32 |   17 |   36 |              19 |   81 |
| 2, 12, 1024, 64  fp32 |   61 |  137 |              70 |  306 |
| 1, 12, 2048, 64  fp32 |  136 |  272 |             148 |  579 |
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.ops import attention, backend, dropout

NAME = "fasttune"
_PLAIN_ARGUMENTS = frozenset(
    {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "head_mask", "kwargs"}
)
_POSITION_BIAS = "position_bias"  # T5's family adds it to the scores, beside the mask
# A model that asks for an implementation by name may do something for it that it would not do for ours. Asking for
# eager is what GPT-2 does, for an option that it heeds with no other implementation either.
_ASKS_BY_NAME = re.compile(r"_attn_implementation\s*(==\s*[\"'](?!eager)|!=|(not\s+)?in\b)")


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(query keyᵀ · scaling + mask + bias) value, by `fasttune.ops.attention`.

    query: [rows, heads, queries, width]. key, value: [rows, heads or fewer, keys, width].
    attention_mask: additive, broadcast to [rows, heads, queries, at least keys]. scaling: width ** -0.5 if None.
    position_bias: the same, of relative positions (T5).
    Returns the result [rows, queries, heads, width]; weights never exist as a whole.

    What that op does not take, a mask or bias that is trained (Swin's relative positions) or values of another
    width than the keys (DeepSeek's), is computed by PyTorch's plain products, whose scores autograd keeps.
    """
    parts = [part[..., : key.shape[-2]] for part in (attention_mask, position_bias) if part is not None]
    mask = sum(parts[1:], parts[0]) if parts else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if value.shape != key.shape or (mask is not None and mask.requires_grad):
        return _products(query, key, value, mask, scale, dropout, module.training), None
    if mask is not None and mask.dtype in (torch.float16, torch.bfloat16) and mask.dtype != query.dtype:
        mask = mask.to(torch.float32)  # exact, and what the sum with the scores would be
    return attention(query, key, value, mask, scale=scale, dropout=dropout, training=module.training), None


def _products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, p: float, training: bool
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=wide)
    weights = dropout(weights, p, training=training).to(value.dtype)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous()


def choose(model: Any, wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """Sets the model's attention implementation and says which, and why.

    wanted: "auto", or a name that transformers knows. auto is ours on CPU in bf16 and fp32, where the
    model's own plain attention is the textbook one. Without compiled kernels it is eager in bf16. Otherwise it is
    what transformers chose.
    """
    config = getattr(model, "config", None)
    current = getattr(config, "_attn_implementation", None)
    if current is None:
        return "the model's own (no choice)"
    if wanted != "auto":
        model.set_attn_implementation(wanted)
        return f"{wanted} (asked for)"
    bf16 = dtype == torch.bfloat16
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return f"{current} (transformers' choice)"
    if getattr(config, "output_attentions", False):
        return f"{current} (the model's config asks for the attention weights)"
    if not _is_textbook(model):
        return f"{current} (the model's own is not the textbook one, or not exchangeable)"
    kernels = backend("attention", torch.empty(0, dtype=dtype))
    if kernels.name != "reference":
        _register()
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if hasattr(module, "set_attn_implementation"):
                module.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
        return f"{NAME} (its own kernel, the fastest on CPU in {'bf16' if bf16 else 'fp32'})"
    if bf16:
        model.set_attn_implementation("eager")
        return f"eager (plain products, the fastest on CPU in bf16 without our kernel: {kernels.why})"
    return f"{current} (transformers' choice; not ours: {kernels.why})"


def _refuse_weights(model: Any, _: tuple, named: dict[str, Any]) -> None:
    """transformers would return an empty tuple of weights, and no error."""
    if named.get("output_attentions") and model.config._attn_implementation == NAME:
        raise ModelError(
            "output_attentions: the weights never exist as a whole in fasttune's attention; set train.attention "
            "to eager, or call set_attn_implementation('eager') on the model"
        )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def _is_textbook(model: nn.Module) -> bool:
    """Whether the model and its parts go through transformers' attention registry, and mean what we compute."""
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        return False
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    attending = [file for file in files if hasattr(file, "eager_attention_forward")]
    return bool(attending) and all(
        _computes_the_textbook(file.eager_attention_forward) and not _ASKS_BY_NAME.search(inspect.getsource(file))
        for file in attending
    )


def _computes_the_textbook(eager: Callable[..., Any]) -> bool:
    """By its arguments, which are the usual ones (soft caps would be others), and by example, which fails where
    sinks are read from the module."""
    arguments = set(inspect.signature(eager).parameters)
    if not arguments <= _PLAIN_ARGUMENTS | {_POSITION_BIAS}:
        return False
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=generator, device="cpu").unbind()
    mask = torch.randn(2, 1, 5, 5, generator=generator, device="cpu")
    bias = torch.randn(1, 4, 5, 5, generator=generator, device="cpu") if _POSITION_BIAS in arguments else None
    biased = {} if bias is None else {_POSITION_BIAS: bias}
    module = SimpleNamespace(training=False, num_key_value_groups=1)
    try:
        found = eager(module, query, key, value, mask, scaling=0.7, dropout=0.0, **biased)[0]
    except (AttributeError, TypeError):  # it reads more of its module, or wants more arguments
        return False
    expected = _products(query, key, value, mask if bias is None else mask + bias, 0.7, 0.0, training=False)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
