# Every target works in a fresh clone: the first one run creates .venv and installs the tested versions.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
ARGS ?=

# $(call install_torch,PYTHON -m pip install ...): torch at its pin. Where no NVIDIA GPU answers, the CPU build, which
# spares gigabytes of CUDA libraries; where PyTorch's index cannot be reached, the build that pip is configured to find.
# --no-deps keeps this to one package; the second line adds what torch needs, or takes torch from pip's own index.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
define install_torch
nvidia-smi -L >/dev/null 2>&1 || $(1) --no-deps --retries 2 --timeout 15 --index-url $(CPU_INDEX) torch \
	|| echo "no CPU build of torch at $(CPU_INDEX): taking the build that pip finds by itself"
$(1) torch
endef

unexport PYTHONPATH

.PHONY: help test slow lint docs demo train-demo mutate soak compile matrix matrix-floor matrix-kernels matrix-newest
help:
	@echo "make test | lint | docs | demo | train-demo    (ARGS='...' is passed on, e.g. make test ARGS='-k floors')"
	@echo "make matrix-floor | matrix-kernels | matrix-newest    the suite at other versions; make matrix runs all three"
	@echo "make slow | mutate | soak | compile            for a nightly run: tests of every combination; break the kernels;"
	@echo "                                               an hour of video, killed on the way; compile with Triton 3.6.0"

# torch first and alone, at its pin, so that no other requirement chooses its build
$(STAMP): pyproject.toml setup.py .ci/constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install_torch,$(INSTALL))
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[docs,model,video,metrics,cluster,serve,test]'
	touch $@

# a process for each core; files stay together, since many share what they build
SHARED := -n auto --dist loadfile
test: $(STAMP)
	$(BIN)/pytest $(SHARED) $(ARGS)

slow: $(STAMP)
	$(BIN)/pytest -m slow $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

# pages and docstrings as a site, in site/; a broken link or reference fails
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --config-file .ci/mkdocs.yml $(ARGS)

demo: $(STAMP)
	$(BIN)/python -m flexkern.demo $(ARGS)

train-demo: $(STAMP)
	$(BIN)/python -m flexkern.demo.train $(ARGS)

mutate: $(STAMP)
	$(BIN)/python tests/support/mutate.py $(ARGS)

# an hour of the demo's video, killed and resumed on the way; hours on a CPU
soak: $(STAMP)
	$(BIN)/python bench/soak.py $(ARGS)

# the Triton of torch 2.11, in an environment of its own; --no-deps, because torch pins another
TRITON ?= 3.6.0
OTHER := .venv-triton-$(TRITON)
OTHER_INSTALL := $(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check
compile:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(call install_torch,$(OTHER_INSTALL) --constraint .ci/constraints.txt)
	$(OTHER_INSTALL) --constraint .ci/constraints.txt numpy setuptools
	$(OTHER_INSTALL) --no-deps triton==$(TRITON)
	$(OTHER)/bin/python tests/support/compile_kernels.py $(ARGS)

# The suite with other versions, each in an environment of its own: all lower bounds of pyproject.toml at once (the
# kernels are skipped there), the oldest torch and Triton that run the kernels, the newest releases that were tried.
# `make matrix-newest VERSIONS=/dev/null` takes whatever is newest today.
matrix: matrix-floor matrix-kernels matrix-newest
matrix-floor matrix-kernels matrix-newest: matrix-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(call install_torch,$(MATRIX_INSTALL))
	$(MATRIX_INSTALL) --upgrade setuptools
	$(MATRIX_INSTALL) --upgrade --no-build-isolation --editable '.[model,video,metrics,cluster,serve,test]'
	.venv-$*/bin/python -m pytest $(SHARED) $(ARGS)
matrix-%: VERSIONS ?= .ci/$*.txt
matrix-%: MATRIX_INSTALL = .venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VERSIONS)
