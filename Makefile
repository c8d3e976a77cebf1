# Every target works in a fresh clone: the first one run creates .venv and installs the tested versions.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
ARGS ?=

unexport PYTHONPATH
# `python -m` puts the repository root on sys.path, where kernels/ would shadow Hugging Face's package
demo train-demo: export PYTHONSAFEPATH := 1

.PHONY: help test lint demo train-demo mutate compile
help:
	@echo "make test | lint | demo | train-demo    (ARGS='...' is passed on, e.g. make test ARGS='-k floors')"
	@echo "make mutate | compile                   for a nightly run: break the kernels; compile them with Triton 3.6.0"

# torch first and alone, at its pin, so that no other requirement chooses its build
$(STAMP): pyproject.toml setup.py .ci/constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[model,video,metrics,test]'
	touch $@

test: $(STAMP)
	$(BIN)/pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(STAMP)
	$(BIN)/python -m flexkern.demo $(ARGS)

train-demo: $(STAMP)
	$(BIN)/python -m flexkern.demo.train $(ARGS)

mutate: $(STAMP)
	$(BIN)/python tests/support/mutate.py $(ARGS)

# the Triton of torch 2.11, in an environment of its own; --no-deps, because torch pins another
TRITON ?= 3.6.0
OTHER := .venv-triton-$(TRITON)
compile:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt torch numpy setuptools
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$(TRITON)
	$(OTHER)/bin/python tests/support/compile_kernels.py $(ARGS)
