"""Compiles every CUDA source for every architecture, without a GPU, and fails on a spill.

    python tools/kernels_check.py [csrc/x.cu ...]

Prints a line a kernel and architecture: registers, static shared memory, spilled bytes. Then the syntax of the
bindings, which no machine without a CUDA build of torch compiles otherwise. Without nvcc: one line, status 0.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
FLAGS = ("-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings")
JOBS = 2


class Usage(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    shared: int  # bytes
    spilled: int  # bytes stored and loaded, and the stack


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin/nvcc")) if home else shutil.which("nvcc")


def demangle(names: list[str]) -> list[str]:
    """As they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return names
    found = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (re.sub(r"\(anonymous namespace\)::|fasttune::(cuda::)?|^void ", "", name) for name in found)
    return [re.sub(r"\(\w+\)$", "", name) for name in short]


def usages(report: str, architecture: str) -> list[Usage]:
    """Out of what `ptxas -v` prints, which is a paragraph a kernel."""
    kernels = re.split(r"Compiling entry function '([^']+)'", report)[1:]
    found = []
    for name, text in zip(demangle(kernels[::2]), kernels[1::2], strict=True):
        numbers = {
            what: sum(map(int, re.findall(pattern, text)))
            for what, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "spilled": r"(\d+) bytes (?:stack frame|spill stores|spill loads)",
            }.items()
        }
        found.append(Usage(name, architecture, **numbers))
    return found


def compile_one(compiler: str, source: Path, architecture: str) -> list[Usage]:
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *FLAGS, "-c", f"-arch={architecture}", "-Xptxas", "-v", str(source)]
        run = subprocess.run([*command, "-o", f"{folder}/x.o"], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{source.name} does not compile for {architecture}:\n{run.stderr[:4000]}")
    return usages(run.stderr, architecture)


def bindings_syntax(compiler: str) -> None:
    """A CPU build of torch has the headers, but not the one that its build for CUDA would generate."""
    from torch.utils import cpp_extension

    headers = sysconfig.get_paths()["include"]
    include = [*cpp_extension.include_paths(), str(cuda_home(compiler) / "include"), headers]
    command = [
        cpp_extension.get_cxx_compiler(), "-fsyntax-only", "-std=c++20", "-Wall", "-Werror=return-type",
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DTORCH_EXTENSION_NAME=_C", "-DFASTTUNE_CUDA",
        *(f"-isystem{path}" for path in include),
    ]  # fmt: skip
    for name in ("bindings_cuda.cpp", "bindings.cpp"):
        run = subprocess.run([*command, str(ROOT / "csrc" / name)], capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"{name} does not compile:\n{run.stderr[:4000]}")
        print(f"{name}: syntax right")


def cuda_home(compiler: str) -> Path:
    """nvcc may be a script or a link far from its toolkit; it tells where that is."""
    run = subprocess.run([compiler, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ (?:TOP|_HERE_)=(.+)$", run.stderr, re.MULTILINE)
    if found is None:
        raise SystemExit(f"kernels-check: {compiler} --dryrun does not name its toolkit:\n{run.stderr[:2000]}")
    home = Path(found[1])
    return home.parent if "_HERE_" in found[0] else home


def main() -> int:
    compiler = nvcc()
    if compiler is None:
        print("kernels-check: skipped, nvcc is not on the PATH (nor in CUDA_HOME)")
        return 0
    sources = [Path(name) for name in sys.argv[1:]] or sorted([*ROOT.glob("csrc/*.cu"), *ROOT.glob("bench/*.cu")])
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(JOBS) as pool:
        tables = list(pool.map(lambda job: compile_one(compiler, *job), jobs))
    found = sorted(usage for table in tables for usage in table)
    print(f"{'kernel':60} {'arch':8} {'registers':>9} {'shared':>6} {'spilled':>7}")
    for usage in found:
        print(f"{usage.kernel:60} {usage.architecture:8} {usage.registers:9} {usage.shared:6} {usage.spilled:7}")
    spilling = [usage for usage in found if usage.spilled]
    if spilling:
        names = ", ".join(f"{usage.kernel} ({usage.architecture})" for usage in spilling)
        print(f"kernels-check: {len(spilling)} of {len(found)} spill or use a stack: {names}", file=sys.stderr)
        return 1
    if len(sys.argv) == 1:
        bindings_syntax(compiler)
    print(f"kernels-check: {len(found)} kernels, no spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
