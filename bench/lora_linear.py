"""A linear layer with a low-rank adapter, forward and backward, against PEFT's composition of PyTorch's ops.

Rows of a MiniLM step (32 texts of 90 tokens), rank 16, dropout 0.05, adapters in float32 or the layer's type.
pytest bench/lora_linear.py --benchmark-enable --benchmark-group-by=param:shape,param:dtypes
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttune.ops import lora_linear

BF16, FP32 = torch.bfloat16, torch.float32


def fused(x, weight, bias, a, b):
    return lora_linear(x, weight, bias, a, b, scale=2.0, dropout=0.05, training=True)


def as_peft(x, weight, bias, a, b):
    low = F.linear(F.dropout(x.to(a.dtype), 0.05, training=True), a)
    y = F.linear(x, weight, bias)
    return (y + F.linear(low, b) * 2.0).to(y.dtype)


def base_only(x, weight, bias, a, b):
    return F.linear(x, weight, bias)


@pytest.mark.parametrize("shape", [(384, 384), (384, 1536), (1536, 384)], ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, FP32), (BF16, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("function", [fused, as_peft, base_only], ids=lambda f: f.__name__)
def test_lora_linear(benchmark, function, dtypes, shape):
    dtype, adapter = dtypes
    ins, outs = shape
    x = torch.randn(2880, ins).to(dtype).requires_grad_()
    weight, bias = (torch.randn(outs, ins) / ins**0.5).to(dtype), torch.randn(outs).to(dtype)
    a = torch.randn(16, ins, dtype=adapter, requires_grad=True)
    b = torch.randn(outs, 16, dtype=adapter, requires_grad=True)
    upstream = torch.randn(2880, outs).to(dtype)
    wanted = (x,) if function is base_only else (x, a, b)
    benchmark(lambda: torch.autograd.grad(function(x, weight, bias, a, b), wanted, upstream))
