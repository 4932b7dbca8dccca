"""The ops that carry a fine-tuning step. Each file: the op, its plain PyTorch reference, its registration."""

from fasttune.ops.attention import attention
from fasttune.ops.batch_norm import batch_norm
from fasttune.ops.cross_entropy import cross_entropy
from fasttune.ops.deformable_attention import deformable_attention
from fasttune.ops.dropout import dropout
from fasttune.ops.library import Backend, backend, build_info, forget_uses, raise_pending, used
from fasttune.ops.linear_cross_entropy import linear_cross_entropy
from fasttune.ops.lora_linear import lora_linear

__all__ = [
    "Backend",
    "attention",
    "backend",
    "batch_norm",
    "build_info",
    "cross_entropy",
    "deformable_attention",
    "dropout",
    "forget_uses",
    "linear_cross_entropy",
    "lora_linear",
    "raise_pending",
    "used",
]
