# Everything runs in an environment of its own, built on first use and reused until a requirement changes.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test lint docs readme fuzz bench-cpu bench-gpu clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/bench-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/lcnn-compile demo

test: lint docs
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs docs/_build

readme: $(VENV)/ready
	$(BIN)/python benchmarks/readme.py

fuzz: $(VENV)/ready
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 2 -k "not triton"

bench-cpu: $(VENV)/bench-ready
	$(BIN)/lcnn-compile bench all

bench-gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist docs/_build demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
