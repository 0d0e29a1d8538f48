# A Python of at least 3.11: python3 when it is new enough, else the newest one beside it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
BASE := .venv/.base
READY := .venv/.ready

# Two processes share the tests, but on a GPU, whose memory they measure. A file runs alone, and without coverage.
SHARED := $(if $(wildcard /dev/nvidia0),,-n 2 --dist worksteal)
FILE ?=

export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test lint

help:  ## show this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ {printf "make %-6s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## create .venv with everything that development needs (the others do it first)

demo: $(BASE)  ## draw demo.png with the bundled model; installs only what that takes
	$(BIN)/vortex generate "a green ring in the center of a yellow background" --seed 7 --overwrite -o demo.png

test: $(READY)  ## run all tests, without a network; of one file: make test FILE=tests/test_nf4.py
	$(BIN)/python -m pytest $(if $(FILE),$(FILE),$(SHARED) --cov --cov-report=term)

lint: $(READY)  ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BASE): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Vortex needs Python 3.11 or newer; $(or $(PYTHON),python3) is not. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "$(PYTHON) lacks the venv module. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(READY): $(BASE)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
