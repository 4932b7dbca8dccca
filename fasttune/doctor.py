"""`fasttune doctor`: the machine, torch and the kernels."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from typing import Any

import torch

from fasttune import __version__
from fasttune.adapt import DTYPES, native_precision
from fasttune.errors import PluginError
from fasttune.ops import backend, build_info
from fasttune.ops.library import OPS
from fasttune.task import GROUP, installed, load


def diagnose() -> dict[str, Any]:
    """Facts by name, in the order they are shown."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "fasttune": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "datasets": metadata.version("datasets"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "device": _device(device),
        "precision": f"{native_precision(device)} by default",
        "C++ compiler": shutil.which("c++") or shutil.which("g++") or "none found: kernels can't be built here",
        "CUDA compiler": shutil.which("nvcc") or "none found",
    }
    for key, value in build_info().items():
        found[f"kernels: {key}"] = value
    example = torch.zeros(1, 1, dtype=DTYPES[native_precision(device)], device=device)
    for op in sorted(OPS):
        served = backend(op, example)
        found[f"op {op}"] = f"{served.name}: {served.why}"
    for plugin in installed():
        found[f"task {plugin.name}"] = f"{plugin.distribution} {plugin.version}{_fault(plugin)}"
    return found


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu (no CUDA device is visible)"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"


def _fault(plugin: Any) -> str:
    if plugin.group != GROUP:
        return f", made for contract {plugin.group.rpartition('.')[2]}"
    try:
        load(plugin)
    except PluginError as error:
        return f", BROKEN: {error}"
    return ""
