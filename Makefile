# `make bench` runs the main job, `make test` the tests; both set up everything they need in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/bench

.PHONY: bench test slow lint format clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

bench: $(VENV)/.installed  ## compare the default plans on the default models; writes $(OUT)/report.html and plan.yaml
	$(BIN)/tokenthrift bench --suite quick --out $(OUT)

test: $(VENV)/.installed  ## everything but the slow tests
	$(BIN)/python -m pytest

slow: $(VENV)/.installed  ## the slow tests too
	$(BIN)/python -m pytest -m ''

lint: $(VENV)/.installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
