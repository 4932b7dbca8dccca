# make setup | demo | test | lint | bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PLUGINS := $(wildcard plugins/*)
BENCHES := $(filter-out bench/conftest.py bench/measure.py bench/train.py,$(wildcard bench/*.py))
STAMP := $(VENV)/.setup
export HF_HUB_OFFLINE := 1

.PHONY: setup demo test lint bench
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
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

# By name: pytest looks into no folder for files that are not called test_*.py.
bench: setup
	$(BIN)/python -m pytest -q --benchmark-enable --benchmark-quiet $(BENCHES)
