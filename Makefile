# make demo   decompose TMS 40-10 on this machine        make test   the tests
# make bench  time, bounds, memory, scaling              make lint   format, lint and types      (BENCH="--quick", "--markdown", "--only step_time")
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint
demo: .venv/installed
	$(BIN)/python -m apd_jax.main --config=configs/tms.py:40-10 --workdir=runs/demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

bench: .venv/installed-dev
	$(BIN)/python benchmarks --json runs/bench.json $(BENCH)

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "apd_jax needs Python 3.11 or newer; use: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ .venv/installed
