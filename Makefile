# make demo   TMS 40-10 by our recipe and as published    make test   the tests
# make lint   format, rules and types                     make docs   the pages of docs/; a warning is an error
# make bench  time, bounds, memory, scaling               (BENCH="--quick", "--markdown", "--only step_time")
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint docs
demo: .venv/installed
	$(BIN)/python -m apd_jax.commands.demo --workdir=runs/demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

bench: .venv/installed-dev
	$(BIN)/python benchmarks --json runs/bench.json $(BENCH)

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/installed-dev
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo "Pages: $(CURDIR)/docs/_build/html/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "apd_jax needs Python 3.11 or newer; use: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	touch $@ .venv/installed
