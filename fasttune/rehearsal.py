"""A training step for the clock: the engine on a small random transformer, and the same in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune import contests
from fasttune.adapt import Adapted, LoRALinear, adapt
from fasttune.batching import Batches, MicroBatch, Position
from fasttune.config import Lora, Train
from fasttune.optim import Optimizer
from fasttune.task import Bundle, Loss
from fasttune.train import LossModule, train

LABELS, VOCABULARY = 16, 1000
MANY = 10**9  # steps: more than anybody waits for
LR = 1e-3
# Two ways through a network of that many roundings; a wrong gradient is off by its own size.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


def rehearse(
    size: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """A step of fasttune's engine, and steps of plain PyTorch by the attention they use, after a check that loss
    and gradients are alike without dropout.

    size: rows, tokens a row, hidden size, layers. LoRA on every linear layer of the encoder, dropout 0.1 in the
    model and 0.05 in the adapters, AdamW, gradients clipped. Plain PyTorch keeps no fp32 masters, which is less
    to do.
    """
    rows, tokens, hidden, layers = size
    model = _model(tokens, hidden, layers)
    random = torch.Generator().manual_seed(0)
    tensors = {
        "input_ids": torch.randint(0, VOCABULARY, (rows, tokens), generator=random),
        "attention_mask": (
            torch.arange(tokens) < tokens - torch.arange(rows)[:, None] * tokens // (10 * rows)
        ).long(),
        "labels": torch.randint(0, LABELS, (rows,), generator=random),
    }
    adapted = _adapted(copy.deepcopy(model), dtype, device)
    stock = {}
    for implementation in ("sdpa", "eager"):
        plain = _plain(model, adapted, implementation).to(device)
        _check(adapted.bundle.model, plain, tensors, device, dtype)
        stock[implementation] = _plain_step(plain, tensors, device)
    return _engine_step(adapted, tensors), stock


def _model(tokens: int, hidden: int, layers: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=4 * hidden,
        max_position_embeddings=tokens,
    )
    config.num_labels = LABELS
    return BertForSequenceClassification(config)


def _adapted(model: Any, dtype: torch.dtype, device: str) -> Adapted:
    blocks = tuple(f"bert.encoder.layer.{i}" for i in range(model.config.num_hidden_layers))
    targets = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("bert.encoder.")
    )
    bundle = Bundle(model, None, ("classifier",), blocks, targets)
    lora = Lora(rank=contests.RANK, dropout=contests.LORA_DROPOUT)
    adapted = adapt(bundle, lora, dtype=dtype, device=device)
    for module in model.modules():  # B is zero at the start, and A would get no gradient to check
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.02)
    for name, parameter in adapted.trained.items():
        adapted.masters[name] = parameter.detach().float()
    return adapted


class _PlainLoRA(nn.Module):
    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor):
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = (nn.Parameter(t.detach().clone()) for t in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        base, p = self.base, contests.LORA_DROPOUT if self.training else 0.0
        return contests.torch_lora(x, base.weight, base.bias, self.lora_a, self.lora_b, p)


def _plain(model: nn.Module, adapted: Adapted, implementation: str) -> nn.Module:
    """The same weights and adapters in PyTorch's own modules, in the same type."""
    plain: Any = copy.deepcopy(model)
    plain.set_attn_implementation(implementation)
    dtype = next(iter(adapted.trained.values())).dtype
    plain.to(dtype).requires_grad_(False)
    for name in adapted.bundle.lora_targets:
        ours: Any = adapted.bundle.model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(
            plain.get_submodule(parent), child, _PlainLoRA(plain.get_submodule(name), ours.lora_a, ours.lora_b)
        )
    plain.classifier.requires_grad_(True)
    return plain


def _loss(model: Any, tensors: dict[str, Tensor]) -> Loss:
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
    total = F.cross_entropy(logits.float(), tensors["labels"], reduction="sum")
    return Loss(total, len(logits))


class _OneBatch:
    """Stands for `Batches`: the same batch for ever."""

    def __init__(self, tensors: dict[str, Tensor]):
        rows, tokens = tensors["input_ids"].shape
        cost = int(tensors["attention_mask"].sum())
        self.micro = MicroBatch(tensors, list(range(rows)), cost, rows * tokens)

    def starting(self, position: Position) -> Iterator[tuple[list[MicroBatch], Position]]:
        while True:
            yield [self.micro], position


def _engine_step(adapted: Adapted, tensors: dict[str, Tensor]) -> Callable[[], Any]:
    optimizer = Optimizer(adapted, Train(lr=LR, head_lr=LR), MANY)
    module = LossModule(adapted.bundle.model, _loss)
    records = train(module, cast(Batches, _OneBatch(tensors)), optimizer, set_mode=adapted.train_mode)
    return lambda: next(records)


def _plain_step(model: nn.Module, tensors: dict[str, Tensor], device: str) -> Callable[[], Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)

    def step() -> float:
        model.train()
        loss = _loss(model, {name: tensor.to(device) for name, tensor in tensors.items()})
        (loss.total / loss.count).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.total.detach())

    return step


def _check(ours: nn.Module, plain: nn.Module, tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    found = []
    for model in (ours, plain):
        model.eval()
        loss = _loss(model, tensors)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss.total, list(trained.values()))
        found.append((loss.total, dict(zip(trained, gradients, strict=True))))
    (our_loss, our_gradients), (plain_loss, plain_gradients) = found
    contests.assert_close("the step's loss", our_loss, plain_loss, TOLERANCE[dtype])
    if our_gradients.keys() != plain_gradients.keys():
        raise AssertionError("the two sides train different parameters")
    for name, gradient in plain_gradients.items():
        contests.assert_close(f"the gradient of {name}", our_gradients[name], gradient, TOLERANCE[dtype])
