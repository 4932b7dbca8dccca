# make setup | demo | test | lint | bench | kernels-check | test-gpu
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PLUGINS := $(wildcard plugins/*)
BENCHES := $(filter-out $(patsubst %,bench/%.py,conftest measure contenders train generation detection),$(wildcard bench/*.py))
STAMP := $(VENV)/.setup
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test lint bench kernels-check test-gpu
setup: $(STAMP)

# torch first: the kernels are compiled against it, and a looser request would fetch the CUDA build.
$(STAMP): constraints.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*) $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools wheel ninja pybind11 numpy
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[test,lint]" $(foreach plugin,$(PLUGINS),-e "./$(plugin)[test]")
	touch $@

demo: setup
	$(BIN)/fasttune demo text-classification

# The ops first by their references alone, as on a machine without a compiler; then everything.
test: setup
	FASTTUNE_REFERENCE=1 $(BIN)/python -m pytest -q tests/ops
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(foreach end,h cpp cu cuh,csrc/*.$(end) csrc/*/*.$(end)) bench/*.cu)

# By name: pytest looks into no folder for files that are not called test_*.py.
bench: setup
	$(BIN)/python -m pytest -q --benchmark-enable --benchmark-quiet $(BENCHES)

# Every CUDA source for every architecture, without a GPU: fails on a register spill. Skipped without nvcc.
kernels-check: setup
	$(BIN)/python tools/kernels_check.py

# On a machine with a GPU, by the python that has its torch: `make test-gpu PYTHON=python3`. It needs nvcc,
# setuptools, ninja, pytest and transformers, and installs nothing.
test-gpu:
	FASTTUNE_REQUIRE_KERNELS=1 $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -q -m gpu tests/ops -o addopts="-ra --strict-markers --import-mode=importlib"
