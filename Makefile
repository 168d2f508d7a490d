# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+, venv and make.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format types doctest examples docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.11 chooses the interpreter; ARGS='...' is handed on by demo and test."

# One environment: the demo needs [sklearn,plot] of it, all other targets need [dev], which is three times as much.
# Python compiles what it imports, which is far less than all of it (--no-compile saves a third of the time).
# A stamp makes a second call start at once; an install that was interrupted leaves none.
$(DEMO_STAMP): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bilevel needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@rm -f $@ $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[sklearn,plot]'
	@touch $@

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

install: $(STAMP) ## create .venv with the pinned versions and this package, editable

demo: $(DEMO_STAMP) ## run the main job: one L2 strength per feature, on real data
	$(BIN)/bilevel demo $(ARGS)

# A worker per core, one thread each: threads of several workers would fight for the cores.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 $(ARGS)

lint: $(STAMP) ## check style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend style and formatting (ruff)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check the types (mypy --strict)
	$(BIN)/mypy --strict

doctest: $(STAMP) ## run the examples in the docstrings
	$(BIN)/pytest --doctest-modules bilevel

# Examples write their pictures into the current folder: a temporary one, so that the checkout stays clean.
examples: $(STAMP) ## run every examples/*.py without a display
	@set -e; test -n "$(wildcard examples/*.py)" || { echo "no examples/*.py found" >&2; exit 1; }; \
	out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	for example in $(sort $(wildcard examples/*.py)); do \
	    echo "== $$example"; (cd "$$out" && MPLBACKEND=Agg "$(CURDIR)/$(BIN)/python" "$(CURDIR)/$$example"); \
	done

# Warnings are errors; the gallery runs every example, so a page that is built is a page that works.
docs: $(STAMP) ## build the site of the documentation into build/site
	MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q -b html docs build/site

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/gallery docs/sg_execution_times.rst
	find bilevel solvers tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
