# Everything runs in .venv, which is made on first use. The Python to make it with can be chosen:
#     make test PYTHON=python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo picture paper test lint types imports docs docs-serve pytest slow format

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the package, editable, and every extra

# One environment for every target, so that none can disagree with another. It is affordable: on two cores the
# core alone installs in 23 seconds, the core with every extra in 83. The stamp is written last, so that an
# install that broke is tried again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) was not found: install Python 3.11 or newer, or pass PYTHON=its/path." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ease needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): pass" \
	        "PYTHON=/path/to/a/newer/one." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a minute or more the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

demo: $(STAMP)  ## run the demo and say where its report is
	$(BIN)/ease run demo --overwrite
	@echo "The report: $(CURDIR)/runs/demo/report.html"

picture: demo  ## the README's picture, from the demo's report (needs Chromium)
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1200,1500 \
	    --screenshot=$(CURDIR)/docs/report.png file://$(CURDIR)/runs/demo/report.html

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
	$(BIN)/pytest

slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/pytest -m slow

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
