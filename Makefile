# Two commands to begin with: `make train`, `make test`. Everything is installed into .venv, once.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STEPS ?= 150000
ARGS ?=
JOBS ?= 2
# One thread a process: tests run side by side, and small networks lose by sharing a product over cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses $(JOBS) --dist worksteal --durations 15

.DEFAULT_GOAL := help
.PHONY: help install install-dev train test test-slow check arrows fix docs bench clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

train: install ## Train PPO on CartPole-v1; says where curve, video and checkpoint are
	$(BIN)/rookery train ppo CartPole-v1 --steps $(STEPS) $(ARGS)

test: install-dev ## Run every test that is not slow
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: install-dev ## Run the slow tests: learning, long laws
	$(PYTEST) -m slow $(ARGS)

check: install-dev arrows ## Lint, format, types, import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

arrows: install-dev
	$(BIN)/python tests/budgets/import_arrows.py

fix: install-dev ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install-dev ## Build the documentation into site/, with strict links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation: site/index.html"

bench: ## List the benchmarks
	@found=0; for file in benchmarks/[a-z]*.py; do \
	    [ -e "$$file" ] || continue; found=1; \
	    printf '%-48s %s\n' "$(BIN)/python $$file" "$$(sed -n '1s/^"""//;1s/"""$$//;1p' "$$file")"; \
	done; [ $$found = 1 ] || echo "There are no benchmarks yet."

clean: ## Remove what was built and cached, but neither .venv nor runs/
	rm -rf build dist site .pytest_cache .hypothesis .ruff_cache .mypy_cache *.egg-info

install: $(VENV)/.installed ## Create .venv with what training needs
install-dev: $(VENV)/.installed-dev ## The same with what testing, checking and documenting need

# torch first and by itself: a bare torch would be resolved anew with every extra.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
	    for python in python3.11 python3.12 python3.13 python3; do \
	        if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            echo "Creating $(VENV) with $$($$python --version)."; exec $$python -m venv $(VENV); \
	        fi; \
	    done; \
	    echo "Rookery needs Python 3.11 or newer with its venv module, and none of python3.11, python3.12, python3.13," \
	        "python3 is one; install it (Debian: apt install python3 python3-venv) and run make again." >&2; exit 1; }
	@echo "Installing into $(VENV), once; this takes some minutes."
	$(PIP) torch
	$(PIP) --editable ".[envs]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	@touch $@
