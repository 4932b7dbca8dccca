"""Builds `fasttune._C`, the compiled kernels, where torch and a C++ compiler are at hand; else pure Python.

With nvcc and a CUDA build of torch the CUDA kernels are built too; if they don't build, those for the CPU are.

TORCH_CUDA_ARCH_LIST        what CUDA kernels are compiled for, as torch takes it; the devices here by default.
FASTTUNE_NO_KERNELS=1       leaves the kernels out.
FASTTUNE_REQUIRE_KERNELS=1  makes a kernel build that cannot be done fail the install.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


REQUIRED = flag("FASTTUNE_REQUIRE_KERNELS")


def left_out(why: str) -> None:
    """Say in one line that the kernels are left out, or fail where they are required."""
    if REQUIRED:
        raise SystemExit(f"fasttune: FASTTUNE_REQUIRE_KERNELS is set, but the kernels cannot be built: {why}")
    print(f"fasttune: installing without compiled kernels: {why}", file=sys.stderr)


def revision() -> str:
    """The git revision of this tree; `unknown` where it is not a git checkout of its own."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def kernels() -> dict:
    """The arguments of `setup` that build the kernels; none where they cannot be built."""
    if flag("FASTTUNE_NO_KERNELS"):
        left_out("FASTTUNE_NO_KERNELS is set")
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        left_out(f"torch is not importable in the build environment ({error}); "
                 "`pip install --no-build-isolation .` builds against the torch you have")  # fmt: skip
        return {}
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        left_out(f"no C++ compiler ({compiler!r} is not on the PATH; CXX names another)")
        return {}

    extension, has_cuda = cuda_extension(cpp_extension), True
    if extension is None:
        extension, has_cuda = cpu_extension(cpp_extension), False

    class BuildKernels(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                if has_cuda:
                    self.build_with_cuda()
                else:
                    super().build_extensions()
            except FAILURES as error:
                if REQUIRED:
                    raise
                left_out(f"the kernel build failed: {first_line(error)}")
                self.extensions = []

        def build_with_cuda(self) -> None:
            try:
                super().build_extensions()
            except FAILURES as error:
                if REQUIRED:
                    raise
                print(f"fasttune: installing without CUDA kernels: their build failed: {first_line(error)}",
                      file=sys.stderr)  # fmt: skip
                # Another extension object would lack what setuptools has noted on this one.
                vars(extension).update(vars(cpu_extension(cpp_extension)))
                super().build_extensions()

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


FAILURES = (BaseError, RuntimeError, OSError, subprocess.SubprocessError)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def compiler_flags() -> list[str]:
    # Without -ffp-contract=off a compiler may fuse multiply and add on one instruction set and not on
    # another. OpenMP is compiled in but not linked: the symbols come from the copy that torch has loaded,
    # and a second OpenMP runtime would mean a second pool of threads.
    # gcc 12 takes its own intrinsics headers for uninitialized (GCC bug 105593), and warns of calls with vectors
    # (psabi) though all of them are inlined.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    flags = ["-O3", "-g0", "-ffp-contract=off", *quiet] if os.name == "posix" else ["/O2"]
    return [*flags, "-fopenmp"] if sys.platform.startswith("linux") else flags


def cpu_extension(cpp_extension):
    return cpp_extension.CppExtension(
        "fasttune._C",
        [*files("csrc/autograd*.cpp"), "csrc/bindings.cpp", *files("csrc/cpu/*.cpp")],
        define_macros=[("FASTTUNE_REVISION", revision())],
        extra_compile_args=compiler_flags(),
        depends=files("csrc/**/*.h"),
        optional=not REQUIRED,
    )


def cuda_extension(cpp_extension):
    """The kernels for CPU and CUDA; None where torch is a build without CUDA, or nvcc is missing."""
    import torch

    if torch.version.cuda is None:
        return None
    if cpp_extension.CUDA_HOME is None or shutil.which(str(Path(cpp_extension.CUDA_HOME, "bin/nvcc"))) is None:
        print("fasttune: installing without CUDA kernels: nvcc is not found (CUDA_HOME names the toolkit)",
              file=sys.stderr)  # fmt: skip
        return None
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures(cpp_extension.CUDA_HOME))
    named = os.environ["TORCH_CUDA_ARCH_LIST"]
    print(f"fasttune: building CUDA kernels for {named}", file=sys.stderr)
    return cpp_extension.CUDAExtension(
        "fasttune._C",
        [*files("csrc/*.cpp", "csrc/*.cu", "csrc/cpu/*.cpp")],
        define_macros=[("FASTTUNE_REVISION", revision()), ("FASTTUNE_CUDA", None)],
        # nvcc would take the commas for more macros.
        extra_compile_args={
            "cxx": [*compiler_flags(), f"-DFASTTUNE_ARCHITECTURES={','.join(re.split('[ ;]+', named))}"],
            "nvcc": ["-O3", "-lineinfo"],
        },
        depends=files("csrc/**/*.h", "csrc/*.cuh"),
    )


def architectures(cuda_home: str) -> list[str]:
    """Those of the devices here; with none here, every one that is tuned for and that nvcc knows.

    No kernel needs what an architecture ending in `a` has beyond the plain one. PTX is of the plain one, since
    that alone is compiled by the driver for later chips.
    """
    import torch

    command = [str(Path(cuda_home, "bin/nvcc")), "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(present)]
    wanted = {"8.0": "compute_80", "9.0a": "compute_90", "10.0a": "compute_100", "9.0+PTX": "compute_90"}
    return [name for name, needs in wanted.items() if needs in known] or ["8.0+PTX"]


setup(**kernels())
