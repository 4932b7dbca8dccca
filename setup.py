"""Builds `fasttune._C`, the compiled kernels, where torch and a C++ compiler are at hand; else pure Python.

FASTTUNE_NO_KERNELS=1       leaves the kernels out.
FASTTUNE_REQUIRE_KERNELS=1  makes a kernel build that cannot be done fail the install.
"""

from __future__ import annotations

import os
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

    class BuildKernels(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                if REQUIRED:
                    raise
                left_out(f"the kernel build failed: {str(error).splitlines()[0] if str(error) else error!r}")
                self.extensions = []

    # Without -ffp-contract=off a compiler may fuse multiply and add on one instruction set and not on
    # another. OpenMP is compiled in but not linked: the symbols come from the copy that torch has loaded,
    # and a second OpenMP runtime would mean a second pool of threads.
    unix = os.name == "posix"
    # gcc 12 takes its own intrinsics headers for uninitialized (GCC bug 105593), and warns of calls with vectors
    # (psabi) though all of them are inlined.
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    flags = ["-O3", "-g0", "-ffp-contract=off", *quiet] if unix else ["/O2"]
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")
    extension = cpp_extension.CppExtension(
        "fasttune._C",
        ["csrc/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))],
        define_macros=[("FASTTUNE_REVISION", revision())],
        extra_compile_args=flags,
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        optional=not REQUIRED,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


setup(**kernels())
