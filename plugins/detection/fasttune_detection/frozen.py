"""The frozen batch norms of transformers' detectors, by one op in the images' own type.

transformers writes them out as x * scale + bias, of float32 buffers: under bfloat16 activations three passes whose
results are float32, twice the memory, for the convolution behind to round again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fasttune.ops import batch_norm

FROZEN = "FrozenBatchNorm2d"  # what the names of all families' classes end with
_BUFFERS = ("weight", "bias", "running_mean", "running_var")
_EPS = 1e-5  # in all families


class FusedFrozenBatchNorm2d(nn.Module):
    """Takes the place of one of transformers', with which it shares its buffers, and so their names in a file."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.Module):
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, norm.get_buffer(name))
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (self.get_buffer(name).float() for name in _BUFFERS)
        return batch_norm(x, mean, variance, weight, bias, training=False, eps=_EPS)


def frozen_norms(model: nn.Module) -> int:
    """How many frozen batch norms the model has, of either class."""
    return sum(type(module).__name__.endswith(FROZEN) for module in model.modules())


def fuse_frozen_norms(model: nn.Module) -> None:
    """Replaces transformers' frozen batch norms, on this instance."""
    child: Any
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith(FROZEN) and dict(child.named_buffers()).keys() == set(_BUFFERS):
                setattr(parent, name, FusedFrozenBatchNorm2d(child))
