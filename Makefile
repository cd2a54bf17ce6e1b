# Two commands for newcomers: `make demo` and `make test`. Both set up a virtual environment first, if there is none.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types clean

demo: .venv/.errata
	$(BIN)/errata demo

test: .venv/.errata-dev
	$(BIN)/python -m pytest

lint: .venv/.errata-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.errata-dev
	$(BIN)/mypy

# torch first, in the version of constraints.txt, so that the next line finds it and leaves it alone. Which build of that
# version comes is up to the package index: PyPI's for Linux on x86 brings several GB of CUDA libraries. Without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small one.
.venv/.errata: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/.errata-dev: .venv/.errata
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
