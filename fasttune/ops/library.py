"""The door between the ops and their kernels: the torch library `fasttune`, the compiled `_C`, and who runs what.

Schemas, references and autograd are registered by the op's own file through `LIBRARY`; the compiled kernels
register themselves for their device when `_C` is loaded, which happens here, once.

`FASTTUNE_REFERENCE=1` in the environment leaves the kernels unloaded, so that everything runs the references.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fasttune", "FRAGMENT")
FORCED = os.environ.get("FASTTUNE_REFERENCE", "0") not in ("", "0")


@dataclass(frozen=True)
class Backend:
    """Who runs an op.

    name: "cuda" or "cpu" for a compiled kernel of that device, "reference" for plain PyTorch.
    why: what makes it so, in one line.
    """

    name: str
    why: str


@dataclass(frozen=True)
class Op:
    """What `backend` must know of a public op.

    kernel: the registered op whose compiled kernel does the work; None while there is only the reference.
    does: what the kernel does, in a few words; or tells it from the op's tensors.
    refuses: tells from the op's tensors why the kernel is not used for them, or None if it is.
    """

    kernel: str | None
    does: str | Callable[..., str]
    refuses: Callable[..., str | None] = lambda *tensors: None


OPS: dict[str, Op] = {}


def _load() -> tuple[ModuleType | None, str]:
    if FORCED:
        return None, "FASTTUNE_REFERENCE is set"
    if find_spec("fasttune._C") is None:
        return None, "the kernels are not compiled (fasttune._C is missing)"
    try:
        return import_module("fasttune._C"), ""
    except ImportError as error:
        why = f"the compiled kernels do not load: {error}; reinstall fasttune against torch {torch.__version__}"
        warnings.warn(f"fasttune runs its references: {why}", RuntimeWarning, stacklevel=2)
        return None, why


_C, MISSING = _load()


def backend(op: str, *tensors: Tensor | None) -> Backend:
    """Who runs `fasttune.ops.<op>` on these tensors, and why.

    op: the name of a public op, e.g. "dropout".
    tensors: the op's tensor arguments in their order, as many as are at hand; without any, CPU is meant.

    Raises ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(sorted(OPS))}; found {op!r}")
    known = OPS[op]
    device = next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")
    if known.kernel is None:
        return Backend("reference", f"{op} has no compiled kernel in this version")
    if _C is None:
        return Backend("reference", MISSING)
    if not has_kernel(known.kernel, device):
        return Backend("reference", f"no kernel of {op} was compiled for {device}")
    refusal = known.refuses(*tensors)
    if refusal is not None:
        return Backend("reference", refusal)
    does = known.does if isinstance(known.does, str) else known.does(*tensors)
    return Backend(device, f"{does} ({_C.build_info()['cpu'] if device == 'cpu' else device})")


_uses: dict[tuple[str, torch.device, torch.dtype], Backend] = {}


def record_use(op: str, *tensors: Tensor) -> None:
    """Called by a public op, for `used`. Compiled code is not recorded."""
    key = (op, tensors[0].device, tensors[0].dtype)
    if not torch.compiler.is_compiling() and key not in _uses:
        _uses[key] = backend(op, *tensors)


def used() -> dict[str, Backend]:
    """Who ran each op in this process until now, by op and type: {"dropout, bfloat16": Backend}."""
    return {f"{op}, {str(dtype).removeprefix('torch.')}": backend for (op, _, dtype), backend in _uses.items()}


def forget_uses() -> None:
    """Lets `used` begin anew."""
    _uses.clear()


def has_kernel(kernel: str, device: str) -> bool:
    """Whether a compiled kernel of the op `fasttune::<kernel>` is registered for this device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"fasttune::{kernel}", key)


def kernels() -> ModuleType | None:
    """The compiled module, or None where there is none or FASTTUNE_REFERENCE is set."""
    return _C


def build_info() -> dict[str, Any]:
    """What was compiled: `kernels` (bool), then either `why` not, or what `_C` says of itself.

    That is: compiler, torch (built against), revision (git), cuda, architectures, cpu (the instruction set in
    use on this machine) and openmp.
    """
    return {"kernels": False, "why": MISSING} if _C is None else {"kernels": True, **_C.build_info()}


def raise_pending() -> None:
    """Raises the IndexError of a label out of range that a kernel has seen on a GPU: such a kernel reports it with
    the next call, so that no call waits for the device. For where the host has synchronised anyway."""
    if _C is not None:
        _C.raise_pending()


_warned: set[str] = set()


def warn_of_reference(op: str, x: Tensor) -> None:
    """Called by a reference that stands in for a kernel: on CUDA that is slow enough to say so, once an op."""
    if x.is_cuda and op not in _warned and not FORCED:
        _warned.add(op)
        warnings.warn(f"fasttune.ops.{op} runs its reference on CUDA: {backend(op, x).why}", stacklevel=3)
