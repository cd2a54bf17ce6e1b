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

# torch first and by its exact version: an open range would fetch the newest build with its CUDA libraries.
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
