# Everything runs in .venv, which is made on first use. The Python to make it with can be chosen:
#     make test PYTHON=python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
STAMP := $(VENV)/.stamp
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup demo picture paper test lint types imports docs docs-serve pytest slow format

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install the package, editable, with every extra, into .venv

# One environment for every target. The demo needs the core only, everything else needs the extras, too. The stamps are
# written last, so that an installation that failed is tried again.
#
# Without a GPU the CPU build of torch is enough, which is several gigabytes smaller. uv chooses it by itself; pip gets it
# from PyTorch's index, and falls back to the default index where that one cannot be reached.
define install
	@if command -v uv >/dev/null 2>&1; then \
	    uv pip install --quiet --python $(BIN)/python --torch-backend=auto -c constraints.txt -e '.$(1)'; \
	else \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(1)'; \
	fi
	@touch $@
endef

$(CORE): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) was not found: install Python 3.11 or newer, or pass PYTHON=its/path." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ease needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): pass" \
	        "PYTHON=/path/to/a/newer/one." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a minute or more the first time."
	@if ! command -v uv >/dev/null 2>&1 && [ "$$(uname)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 15 \
	        --index-url $(CPU_INDEX) "$$(grep '^torch==' constraints.txt)" >/dev/null 2>&1 || true; \
	fi
	$(call install,)

$(STAMP): $(CORE)
	@echo "Installing tests and extras into $(VENV)."
	$(call install,[all])

demo: $(CORE)  ## train and compare on Python's own sources: minutes on 2 cores; writes a report
	$(BIN)/ease run demo --overwrite

picture: $(STAMP) demo  ## the README's pictures, from the demo's report (needs Chromium)
	$(BIN)/python -m experiments.analysis.pictures runs/demo

# It needs Debian's latexmk and texlive-latex-base, and no more:
#     apt-get install --no-install-recommends latexmk texlive-latex-base
paper: $(STAMP)  ## paper/build/lash.pdf, with the tables of every docs/data/*/test.json (needs latexmk)
	$(BIN)/python -m experiments.paper
	cd paper && latexmk -pdf -silent -outdir=build lash.tex

test: lint types imports docs pytest  ## lint, types, import rules, documentation and the tests that are quick

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict, on src
	$(BIN)/mypy

imports: $(STAMP)  ## who may import whom
	$(BIN)/lint-imports

docs: $(STAMP)  ## the documentation site, in build/docs; a dead link or a missing reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(STAMP)  ## the documentation site on a local port, rebuilt on every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

pytest: $(STAMP)  ## the tests that are quick
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/pytest -m slow

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
