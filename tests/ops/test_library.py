"""Who runs an op and why: with kernels, without them, and when they are there but do not load."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from fasttune.ops import backend, build_info, library


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, on both channels."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return run.stdout


@pytest.mark.skipif(library._C is None, reason=f"no kernel: {library.MISSING}")
def test_with_kernels_the_cpu_runs_them():
    info = build_info()
    assert info["kernels"]
    assert info["cpu"] in ("avx512", "avx2", "default")
    assert {"compiler", "torch", "revision", "cuda", "architectures", "openmp"} < info.keys()
    for op in ("dropout", "lora_linear"):
        assert backend(op).name == "cpu"
        assert info["cpu"] in backend(op, torch.ones(3)).why
    assert backend("dropout", torch.ones(3, dtype=torch.int32)).why == "dropout does not take torch.int32"
    missing = backend("dropout", torch.ones(3, device="meta"))
    assert (missing.name, missing.why) == ("reference", "no kernel of dropout was compiled for meta")


@pytest.mark.skipif(library._C is not None, reason="the kernels are loaded")
def test_without_kernels_the_reason_is_told():
    assert build_info() == {"kernels": False, "why": library.MISSING}
    assert backend("dropout").why == library.MISSING


def test_environment_forces_the_references():
    code = (
        "import torch, fasttune.ops as ops\n"
        "print(ops.backend('dropout'), ops.build_info())\n"
        "torch.manual_seed(0); print(ops.dropout(torch.ones(4), 0.5, training=True).shape)"
    )
    out = python(code, FASTTUNE_REFERENCE="1")
    assert "Backend(name='reference', why='FASTTUNE_REFERENCE is set')" in out
    assert "{'kernels': False, 'why': 'FASTTUNE_REFERENCE is set'}" in out


def test_kernels_that_do_not_load_are_reported_not_swallowed(tmp_path):
    (tmp_path / "_C.py").write_text("raise ImportError('undefined symbol: _ZN2at4nope')")
    code = (
        f"import fasttune; fasttune.__path__.insert(0, {str(tmp_path)!r})\n"
        "import fasttune.ops as ops; print(ops.backend('dropout').why)"
    )
    out = python(code, FASTTUNE_REFERENCE="")
    assert "RuntimeWarning: fasttune runs its references: the compiled kernels do not load" in out
    assert out.splitlines()[-1].startswith("the compiled kernels do not load: undefined symbol: _ZN2at4nope")


def test_unknown_op_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"^op: expected one of attention, batch_norm, .*, deformable_attention, dropout, .*; found 'relu'",
    ):
        backend("relu")


class OnCuda:
    """What `warn_of_reference` reads of a tensor on a GPU."""

    is_cuda = True
    device = torch.device("cuda")
    dtype = torch.float32


def test_a_reference_on_cuda_warns_once(monkeypatch):
    monkeypatch.setattr(library, "_warned", set())
    monkeypatch.setattr(library, "FORCED", False)
    with pytest.warns(UserWarning, match="runs its reference on CUDA"):
        library.warn_of_reference("dropout", OnCuda())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.warn_of_reference("dropout", OnCuda())
