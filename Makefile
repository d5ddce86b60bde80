# Every target makes .venv itself: Python >= 3.11 (with venv) and an index for pip are all it takes.
# PYTHON picks the interpreter; pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, …) apply as always.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-slow lint bench bench-peers docs clean

# The machine's own python3 where it is new enough, else a newer one beside it.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do "$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
# Files of tests side by side, since fixtures are made once a file; PARALLEL= for one after the other.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
QUESTION ?= What is the capital of France?

$(STAMP): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv was found; install one, or make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[compile,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo "$(QUESTION)"

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Beside transformers; BENCH='--peers llama.cpp,vllm,transformers' after bench-peers, which downloads and compiles
# (some 2 GB; a compiler and cmake for llama.cpp).
bench: $(STAMP)
	$(BIN)/python -m benchmarks.speed $(BENCH)

bench-peers: $(STAMP)
	$(BIN)/python -m benchmarks.speed --environments

docs: $(STAMP)
	$(BIN)/python -m llmc.cli.reference > docs/cli.md

clean:
	rm -rf build dist *.egg-info .demo .bench .pytest_cache .ruff_cache .hypothesis
