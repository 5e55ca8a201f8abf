# The whole developer interface. `make demo` and `make test` work on a fresh machine with git, make and Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SOURCES := metaprune search export configs tests benchmarks

.PHONY: help demo test test-long lint types format clean

help:
	@echo "make demo       install, then train, prune, export, prove a small network, and search (about a minute)"
	@echo "make test       install, then lint, types and the fast tests (about ten minutes on two cores)"
	@echo "make test-long  the same with the long tests"
	@echo "make format     format the code"

demo: $(VENV)/.installed
	$(BIN)/metaprune demo --force

test: lint types
	$(BIN)/pytest -n $(JOBS) -m "not long and not gpu"

test-long: lint types
	$(BIN)/pytest -n $(JOBS) -m "not gpu" --timeout 3600

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check --quiet $(SOURCES)

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed; set PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@ $(VENV)/.installed
