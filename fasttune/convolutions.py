"""Convolutions and the batch norms between them: their memory layout, and a faster batch norm in its place.

A training step, ms, on two cores with AVX512-BF16; transformers' models of random weights, the weights of their
convolutions contiguous and in channels_last, the latter also with FusedBatchNorm2d:

|                                 | contiguous | channels_last | fused |
|---------------------------------|------------|---------------|-------|
| ResNet-18, 16 x 224²       bf16 |        359 |           295 |   289 |
| ResNet-26, 8 x 224²        bf16 |        334 |           260 |   240 |
| MobileNetV2, 16 x 224²     bf16 |        455 |           308 |   292 |
| EfficientNet-B0, 8 x 224²  bf16 |        343 |           339 |   341 |
| small ConvNeXt, 8 x 224²   bf16 |        258 |           260 |   259 |
| small RT-DETR, 8 x 512²    bf16 |        725 |           612 |   467 |
| ResNet-18, 16 x 224²       fp32 |        614 |           536 |   510 |
| ResNet-26, 8 x 224²        fp32 |        546 |           415 |   424 |
| MobileNetV2, 16 x 224²     fp32 |        525 |           371 |   369 |
| EfficientNet-B0, 8 x 224²  fp32 |        439 |           266 |   284 |
| small ConvNeXt, 8 x 224²   fp32 |        558 |           557 |   525 |
| small RT-DETR, 8 x 512²    fp32 |       1086 |           962 |   839 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttune.ops import batch_norm


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d by `fasttune.ops.batch_norm`: parameters, buffers, names and arithmetic are the same."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> FusedBatchNorm2d:
        """Takes the place of `norm`, with which it shares everything, hooks and train mode included."""
        fused = cls.__new__(cls)
        vars(fused).update(vars(norm))
        return fused

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches
                share = 1.0 / float(self.num_batches_tracked)
        kept = not self.training or self.track_running_stats
        mean, variance = (self.running_mean, self.running_var) if kept else (None, None)
        training = self.training or (mean is None and variance is None)
        return batch_norm(
            x, mean, variance, self.weight, self.bias, training=training, momentum=share, eps=self.eps
        )


def lay_out(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Puts the weights of 2-D convolutions in channels_last where that is faster: on CPU in every type (above), on
    CUDA in half precision, for which PyTorch recommends it. The activations follow the weights.

    A model that only cuts its image in patches keeps its layout. Returns what was chosen, and why; None for a
    model without convolutions that overlap.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not any(_overlaps(convolution) for convolution in convolutions):
        return None
    if device.type != "cpu" and (device.type != "cuda" or dtype == torch.float32):
        return "contiguous: convolutions run as PyTorch has them by default"
    for convolution in convolutions:
        convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    return "channels_last: convolutions run without reordering"


def _overlaps(convolution: nn.Conv2d) -> bool:
    return any(size > step for size, step in zip(convolution.kernel_size, convolution.stride, strict=True))


def replace_batch_norms(model: nn.Module) -> None:
    """`nn.BatchNorm2d` becomes FusedBatchNorm2d, on this instance."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, FusedBatchNorm2d.of(child))
