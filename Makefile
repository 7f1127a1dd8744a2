# One command each, on a clone with nothing but Python and git: the first makes .venv and installs into it.
# PYTHON=python3.12 picks another interpreter for .venv; JOBS=1 runs the tests in one process.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.installed
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: help demo test test-slow check format lint types bench docs

help:
	@echo "make demo       draw a sheet of pictures with the embedded checkpoint"
	@echo "make test       run the tests"
	@echo "make test-slow  run those on full-size checkpoints, which write 10 GB"
	@echo "make check      format check, lint, types and tests: what CI runs"
	@echo "make format     rewrite the code in the project's format"
	@echo "make lint       check format and lint"
	@echo "make types      check the types of src"
	@echo "make bench      measure tiny networks beside diffusers; sana-sprint bench measures real ones"
	@echo "make docs       check the documents' links and the README's tree"

demo: $(READY)
	@$(BIN)/sana-sprint generate --grid --seed 1 --output out/demo.png \
		"a red circle" \
		"a small green star" \
		"two blue squares" \
		"three yellow triangles" \
		"a red circle left of a blue square" \
		"a green triangle above a red star" \
		"a blue circle below a yellow square" \
		"a yellow star right of a green circle" \
		"a purple cross on a white ground"

test: $(READY)
	@$(OFFLINE) $(BIN)/python -m pytest --quiet -m "not slow" --numprocesses $(JOBS) --dist loadfile

test-slow: $(READY)
	@$(OFFLINE) $(BIN)/python -m pytest --quiet -m slow

check: lint types test

format: $(READY)
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

lint: $(READY)
	@$(BIN)/ruff format --check --quiet . || { echo "not in format; make format mends it"; exit 1; }
	@$(BIN)/ruff check --quiet .

types: $(READY)
	@$(BIN)/mypy --no-error-summary

bench: $(READY)
	@$(BIN)/sana-sprint bench --quick

docs: $(READY)
	@$(OFFLINE) $(BIN)/python -m pytest --quiet tests/test_architecture.py tests/test_docs.py

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); name another with PYTHON=..."; exit 1; }
	@echo "installing into .venv, once; this takes some minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev,train]'
	@touch $(READY)
