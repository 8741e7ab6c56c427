# `make demo` and `make test` work in a fresh clone: they create an environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-installed test-matrix lint format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks run escape --data digits --seeds 0 --set scatter_lrs= --set settle_loss=none

# One thread per process, so that parallel tests do not compete for cores.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Tests the wheel in a separate environment; then every supported Python and torch that is installed.
test-installed: $(VENV)/.installed
	$(BIN)/nox -s installed

test-matrix: $(VENV)/.installed
	$(BIN)/nox -s tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/worn_words.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds from scratch, so that earlier warnings appear again. The gallery takes a minute.
.PHONY: docs
docs: $(VENV)/.installed
	rm -rf build/docs docs/generated docs/auto_gallery
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs

clean:
	rm -rf $(VENV) .nox build dist runs .pytest_cache .mypy_cache .ruff_cache
