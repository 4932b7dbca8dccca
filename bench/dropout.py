"""Dropout, forward and backward, against `F.dropout`.

pytest bench/dropout.py --benchmark-enable --benchmark-group-by=param:dtype
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttune.ops import dropout

IMPLEMENTATIONS = {
    "fasttune": lambda x: dropout(x, 0.1, training=True),
    "torch": lambda x: F.dropout(x, 0.1, training=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_dropout(benchmark, name, dtype):
    x = torch.randn(2880, 384).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    function = IMPLEMENTATIONS[name]
    benchmark(lambda: torch.autograd.grad(function(x), x, upstream))
