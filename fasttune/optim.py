"""Parameter groups, schedule, and one optimizer step on fp32 master weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttune.adapt import Adapted, block_depths
from fasttune.config import SGD, AdamW, Full, Schedule, Train


@dataclass(frozen=True)
class Step:
    """norm: of the gradient before clipping. taken: False if the gradient was not finite and nothing was done."""

    norm: float
    taken: bool


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step that counts from 0; the last of `steps` comes near `final`."""
    warmup = schedule.warmup if schedule.warmup >= 1 else math.ceil(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.final + (1 - schedule.final) * shape


class Optimizer:
    """Optimizes fp32 masters of what is trained; the model keeps copies in its compute type.

    Gradients are summed in fp32 over micro-batches and divided once by the count of what was supervised, so that
    4 micro-batches of 8 give what 1 of 32 gives, to rounding.
    """

    def __init__(self, adapted: Adapted, config: Train, steps: int):
        self.config, self.steps = config, steps
        self.parameters: dict[str, nn.Parameter] = adapted.trained
        self.masters: dict[str, Tensor] = adapted.masters
        self.depths = block_depths(adapted.bundle, self.parameters)
        self.blocks = len(adapted.bundle.blocks)
        self._rates = adapted.bundle.rates
        self._clip = 1.0 if config.clip is None else config.clip
        strategy = adapted.strategy
        self._decay = strategy.layer_decay if isinstance(strategy, Full) else 1.0
        self._unfreeze = strategy.gradual_unfreezing if isinstance(strategy, Full) else 0.0
        self._groups = self._make_groups(set(adapted.bundle.head))
        self.torch = _make(self._groups, config)

    def _make_groups(self, head: set[str]) -> list[dict]:
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        lr, head_lr = self.config.lr or 0.0, self.config.head_lr or 0.0
        for name, master in self.masters.items():
            in_head = any(name == part or name.startswith(part + ".") for part in head)
            peak = head_lr if in_head else lr * self._decay ** self.depths[name]
            peak *= self._rates.get(_longest(name, self._rates), 1.0)
            groups.setdefault((peak, master.dim() > 1), []).append(master)
        decay = self.config.optimizer.weight_decay
        return [
            {"params": masters, "lr": peak, "peak": peak, "weight_decay": decay if is_matrix else 0.0}
            for (peak, is_matrix), masters in groups.items()
        ]

    def collect(self) -> None:
        """Adds the model's gradients to the masters' in fp32, and frees them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            gradient = _like(master, parameter.grad.to(torch.float32))
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def step(self, step: int, count: float) -> Step:
        """One step with the collected gradients, divided by `count`. A gradient that is not finite is dropped."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        if count > 0:
            torch._foreach_div_(gradients, count)
        norm = torch.nn.utils.get_total_norm(gradients)
        taken = bool(torch.isfinite(norm)) and count > 0
        if taken:
            if self._clip > 0:
                torch._foreach_mul_(gradients, float((self._clip / (norm + 1e-6)).clamp(max=1.0)))
            for group in self.torch.param_groups:
                group["lr"] = group["peak"] * lr_factor(self.config.schedule, step, self.steps)
            self.torch.step()
            self.publish()
        self.torch.zero_grad(set_to_none=True)
        return Step(float(norm), taken)

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the model, rounded to its compute type."""
        torch._foreach_copy_(list(self.parameters.values()), [self.masters[name] for name in self.parameters])

    def lr(self, step: int) -> float:
        """The highest learning rate of a step."""
        return max(group["peak"] for group in self._groups) * lr_factor(self.config.schedule, step, self.steps)

    def unfreeze(self, step: int) -> None:
        """Gradual unfreezing: at the start the head alone is trained, then block after block from the last one
        down; after that share of the run, all of it (ULMFiT, arXiv 1801.06146)."""
        if not self._unfreeze:
            return
        depth = math.floor(step / max(1.0, self._unfreeze * self.steps) * (self.blocks + 1))
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self.depths[name] <= depth)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors, as "parameter name/state name"."""
        names = {id(master): name for name, master in self.masters.items()}
        return {
            f"{names[id(master)]}/{key}": torch.as_tensor(value)
            for master, entries in self.torch.state.items()
            for key, value in entries.items()
            if value is not None
        }

    def load_state(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Puts back what `masters` and `state()` were."""
        for name, master in self.masters.items():
            master.data.copy_(masters[name])
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            master = self.masters[name]
            self.torch.state[master][entry] = value.clone() if value.dim() == 0 else _like(master, value.clone())
        self.publish()


def _like(master: Tensor, value: Tensor) -> Tensor:
    """The value in the strides of its master: fused optimizers go by memory, not by index."""
    return value if value.stride() == master.stride() else torch.empty_like(master).copy_(value)


def _longest(name: str, modules: Iterable[str]) -> str:
    """The longest of the modules' names that a parameter lies in; "" if it lies in none."""
    return max((module for module in modules if name.startswith(f"{module}.")), key=len, default="")


def _make(groups: list[dict], config: Train) -> torch.optim.Optimizer:
    match config.optimizer:
        case AdamW() as chosen:
            return torch.optim.AdamW(groups, betas=chosen.betas, eps=chosen.eps, fused=True)
        case SGD() as chosen:
            return torch.optim.SGD(groups, momentum=chosen.momentum, nesterov=chosen.nesterov, fused=True)
