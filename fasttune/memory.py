"""What a process does with its memory: how much it took, what it keeps, what it gives back."""

from __future__ import annotations

import ctypes
import os

import torch

from fasttune.ops.library import kernels


def keep_pages() -> bool:
    """Lets larger CPU tensors (64 KiB and more) keep their pages from step to step, for the rest of the process.

    glibc gives large freed blocks back to the system, and each step would pay for zeroed pages again; its own
    settings for keeping them (mallopt) leave holes when batches change in length. So PyTorch gets an allocator
    over one reserved range of addresses (csrc/cpu/allocator.cpp). It is the program's to switch on, as
    `fasttune run` does, since it is there for everything that uses PyTorch in the process.

    Returns whether it is on: False without compiled kernels, or on a system that is not Linux.
    """
    compiled = kernels()
    return compiled is not None and compiled.keep_memory()


def keeps_pages() -> bool:
    """Whether `keep_pages` has been switched on."""
    compiled = kernels()
    return compiled is not None and compiled.keeps_memory()


def limit_primitive_cache() -> None:
    """Lets oneDNN keep 128 compiled matrix products instead of 1024, unless the user has said otherwise.

    Each new batch shape compiles a few dozen; kept by the thousand they cost gigabytes and are seldom met again.
    oneDNN reads the variable once, at its first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def return_free_memory() -> None:
    """Gives the pages of freed blocks back to the system (glibc's malloc_trim; elsewhere nothing).

    Batches of changing length leave holes in the heap that the next ones don't fit in: without this the resident
    set of a CPU run grows for hundreds of steps. Where `keep_pages` is on, no tensor of any size is in that heap.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or the process's largest resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
