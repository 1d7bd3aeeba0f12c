# Two commands do everything on a fresh Linux machine with Python and pip:
#   make demo    environment, install, the main job on a real protein
#   make test    environment, install, every test that needs no GPU

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs unit interpreter protein format clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Models of proteins pin versions of their own: an environment beside the other, which it sees.
PROTEIN ?= .venv-protein
# Test processes run side by side, one thread each.
JOBS   ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Many tests start processes, and each test process rewrites every assertion: compiled once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | expand -t 14

demo: $(VENV)/.installed-demo  ## set up, then attention on a protein: table, CSV and plot in results/demo
	$(BIN)/flashbias demo

test: lint docs interpreter unit  ## set up, then all checks and every test that needs no GPU

lint: $(VENV)/.installed-dev  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev  ## build the site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

unit: $(VENV)/.installed-dev  ## tests on the CPU, published weights included
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS) -m "not gpu and not interpreter"

# The interpreter is switched on when triton is imported, hence a process of its own.
interpreter: $(VENV)/.installed-dev  ## the Triton kernels on the CPU, through Triton's interpreter
	TRITON_INTERPRET=1 $(ONE_THREAD) $(BIN)/pytest -n $(JOBS) -m "interpreter and not gpu" tests

# Protenix would compile a kernel for CUDA when it is imported.
protein: $(PROTEIN)/.installed  ## set up, then patched attentions of Boltz, OpenFold3 and Protenix
	LAYERNORM_TYPE=torch $(ONE_THREAD) $(PROTEIN)/bin/python -m pytest -n $(JOBS) tests/integrations/protein

format: $(VENV)/.installed-dev  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) $(PROTEIN) build dist site results

# ---------------------------------------------------------------- environment

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashbias needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# A stamp newer than both files means that the environment is as they say. `dev` contains `demo`.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@if [ $(VENV)/.installed-dev -nt pyproject.toml ] && [ $(VENV)/.installed-dev -nt constraints.txt ]; then \
	  touch $@; else $(call install,demo) && touch $@; fi

# timm comes without torchvision, which package indexes have for CUDA builds of torch only (tests/integrations/timm).
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(call install,dev) && $(PIP) install --quiet --no-deps -c constraints.txt timm && touch $@

# A .pth file lends it the packages of the other environment, torch among them.
$(PROTEIN)/.installed: tests/integrations/protein/requirements.txt $(VENV)/.installed-dev
	$(BIN)/python -m venv --clear $(PROTEIN)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(PROTEIN)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth
	$(PROTEIN)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	touch $@

# The build backend comes first and pinned, so that pip needs no environment of its own to build in.
install = echo "installing flashbias[$(1)] into $(VENV)" \
	&& $(PIP) install --quiet -c constraints.txt hatchling editables \
	&& $(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[$(1)]'
