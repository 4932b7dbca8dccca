"""Dropout whose mask is a function of (seed, element index): never stored, drawn again by the backward.

Philox 4x32-10 (Salmon et al., SC 2011). With i the contiguous logical index of an element, 64 bits wide:

    counter = (low 32 bits of i // 8, high 32 bits of i // 8, 0, 0)
    key     = (low 32 bits of the seed, high 32 bits of the seed)
    u       = the 16 bits number i % 8 of philox(counter, key): of its word i % 8 // 2 the low half
              where i is even, the high half where i is odd
    kept if and only if u >= round(p * 2**16), ties to even

so strides, threads, tiling and device do not change a mask. `csrc/philox.h` says the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops.library import LIBRARY, OPS, Op, record_use, warn_of_reference

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
NO_DOUBLE = "float64 runs the reference on CUDA"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    x: any shape, strided or not, empty or not; float64, float32, float16 or bfloat16.
    p: in [0, 1]. The mask takes it to the nearest multiple of 2**-16, the scale as it is: kept elements are
        x / (1 - p), and the result's expectation is x to a relative 2**-17 / (1 - p) at most. At the ends a p up
        to 2**-17 drops nothing (yet scales), one from 1 - 2**-17 on drops everything.
    training: if false, or if p is 0, x itself is returned.

    Returns a contiguous tensor of x's shape and dtype. Kept values are scaled in float32 (float64 for float64)
    and rounded once; a dropped element is 0 even where x is infinite or NaN, and so is its gradient.
    The 64-bit seed is drawn from torch's default CPU generator, so `torch.manual_seed` repeats a mask and
    activation checkpointing recomputes it. Nothing but the seed is saved for the backward.

    Raises ValueError if p is outside [0, 1], TypeError for another dtype.
    Source: Srivastava et al., JMLR 15 (2014); the random numbers: Salmon et al., SC 2011.
    """
    check_p("p", p)
    if not training or p == 0:
        return x
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float64, float32, float16 or bfloat16, found {x.dtype}")
    record_use("dropout", x)
    return seeded_dropout(x, p, draw_seed())


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout with the mask of this seed, differentiable, by the kernel or the reference."""
    if _refuses(x):
        return _masked(x, p, seed)
    return torch.ops.fasttune.dropout_seeded(x, p, seed)


def draw_seed() -> Tensor:
    """A 64-bit seed from torch's default CPU generator, int64 []. A tensor, so that compiled code draws anew."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu")


def check_p(name: str, p: float) -> None:
    """Raises ValueError naming the argument if it is no probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a probability in [0, 1], found {p}")


def philox_reference(counters: Tensor, seed: int) -> Tensor:
    """counters [n, 4], 32-bit numbers in int64 -> the four random words of each, [n, 4], likewise.

    A product of two 32-bit numbers wraps around in int64, but keeps its 64 bits: masking after the shift
    makes the high half right.
    """
    c0, c1, c2, c3 = counters.unbind(-1)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0 = ((product1 >> 32) & _LOW) ^ c1 ^ key0
        c1 = product1 & _LOW
        c2 = ((product0 >> 32) & _LOW) ^ c3 ^ key1
        c3 = product0 & _LOW
        key0, key1 = (key0 + _W0) & _LOW, (key1 + _W1) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def drawn_reference(draws: Tensor, seed: int) -> Tensor:
    """draws [n], int64 -> the 16 bits of elements 8 * draw .. 8 * draw + 7 of each, [8 n], int64."""
    zero = torch.zeros_like(draws)
    words = philox_reference(torch.stack((draws & _LOW, draws >> 32, zero, zero), dim=-1), seed)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()


def mask_reference(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """The mask, bool of that shape on CPU: true where an element is kept."""
    n = shape.numel()
    drawn = drawn_reference(torch.arange((n + 7) // 8, dtype=torch.int64), int(seed))
    return drawn[:n].view(shape) >= round(p * 2**16)


def dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The specification of `dropout_seeded`, and what runs where no kernel is compiled."""
    return _masked(x, p, seed).to(x.dtype)


def dropout_add_reference_(acc: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    """The specification of `dropout_add_`: acc += dropout(x), added before the one rounding."""
    masked = _masked(x, p, seed)
    acc.copy_(acc.to(masked.dtype) + masked)


def _masked(x: Tensor, p: float, seed: Tensor) -> Tensor:
    kept = mask_reference(x.shape, p, seed).to(x.device)
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    return torch.where(kept, wide * scale, 0.0)


def _stand_in(x: Tensor, p: float, seed: Tensor) -> Tensor:
    warn_of_reference("dropout", x)
    return dropout_reference(x, p, seed)


LIBRARY.define("dropout_seeded(Tensor x, float p, Tensor seed) -> Tensor")
LIBRARY.define("dropout_add_(Tensor(a!) acc, Tensor x, float p, Tensor seed) -> ()")
LIBRARY.impl("dropout_seeded", _stand_in, "CompositeExplicitAutograd")
LIBRARY.impl("dropout_add_", dropout_add_reference_, "CompositeExplicitAutograd")


@torch.library.register_fake("fasttune::dropout_seeded", lib=LIBRARY)
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("fasttune::dropout_add_", lib=LIBRARY)
def _(acc: Tensor, x: Tensor, p: float, seed: Tensor) -> None:
    return None


def _setup(ctx, inputs, output) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad: Tensor):
    (seed,) = ctx.saved_tensors
    return torch.ops.fasttune.dropout_seeded(grad, ctx.p, seed), None, None


torch.library.register_autograd("fasttune::dropout_seeded", _backward, setup_context=_setup, lib=LIBRARY)


def _refuses(x: Tensor | None = None) -> str | None:
    if x is not None and x.dtype not in DTYPES:
        return f"dropout does not take {x.dtype}"
    return NO_DOUBLE if x is not None and x.is_cuda and x.dtype == torch.float64 else None


OPS["dropout"] = Op("dropout_seeded", "mask drawn and applied by the compiled kernel", _refuses)
