# `make demo` and `make test` work from a fresh clone: they make their own environment in .venv.
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

# One thread for each process, so that they do not stand in each other's way.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The wheel in an environment of its own; then every Python and torch that is promised, where they are found.
test-installed: $(VENV)/.installed
	$(BIN)/nox -s installed

test-matrix: $(VENV)/.installed
	$(BIN)/nox -s tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The gallery is run: a minute. Everything is made anew, so that a warning of before is there again.
.PHONY: docs
docs: $(VENV)/.installed
	rm -rf build/docs docs/generated docs/auto_gallery
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs

clean:
	rm -rf $(VENV) .nox build dist runs .pytest_cache .mypy_cache .ruff_cache
