"""The CUDA kernels on the host: `emulated`, a library compiled from csrc/emulation/ once a session."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune.ops import library

CSRC = Path(__file__).resolve().parents[2] / "csrc"
DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Emulation:
    """The functions of csrc/emulation/library.cpp. Tensors go in as pointers; a kernel that fails raises."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulation_error.restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)

        def call(*arguments: Any) -> int:
            status = function(*map(_as_c, arguments))
            error = self.library.emulation_error()
            if error:
                raise RuntimeError(f"{name}: {error.decode()}")
            return status

        return call


def _as_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return DTYPE[value]
    if isinstance(value, bool | float):
        return ctypes.c_double(value) if isinstance(value, float) else int(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    if library.FORCED:
        pytest.skip("FASTTUNE_REFERENCE is set: no kernel takes part")
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulation of CUDA kernels needs Linux")
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("the emulation of CUDA kernels needs a C++ compiler")
    built = tmp_path_factory.mktemp("emulation") / "emulation.so"
    # Without contraction, as on the CPU: dropout is compared bit by bit.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(CSRC / "emulation/library.cpp"), "-o", str(built)], check=True)
    return Emulation(ctypes.CDLL(str(built)))
