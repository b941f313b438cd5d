# The project's commands. Each makes the environment first if it is not there; PYTHON= names the Python that it is made with.
PYTHON = python3
VENV = .venv
DEVICE =
BIN = $(VENV)/bin
RELAXED = --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls --allow-untyped-decorators --allow-any-generics --no-warn-return-any

# idle OpenMP threads spin only for the moment between two operations: longer starves the other processes of a small box
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 4000

.PHONY: help setup demo test test-slow test-browser lab check notebooks figures bench gpu-check clean ready
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

ready:
	@$(PYTHON) scripts/setup.py --venv "$(VENV)" --device "$(DEVICE)" $(if $(filter file,$(origin PYTHON)),--any-python)

setup: ready  ## the environment, the package and its notebook kernel (DEVICE=auto|cpu|gpu)
	@echo "setup: $(VENV) is ready; kernel \"Workbench\", commands in $(BIN)"

demo: ready  ## a rollout over 4 ranks with a real engine that sleeps, with tables and a report
	@$(BIN)/workbench demo

lab: ready  ## JupyterLab on notebooks/, on loopback only
	@$(BIN)/workbench lab

test: ready  ## the tests
	@$(BIN)/python -m pytest

test-slow: ready  ## the tests that take minutes or a network
	@$(BIN)/python -m pytest -m slow

test-browser: ready  ## the tests in a real JupyterLab; Debian's Chromium is installed where it is missing
	@scripts/chromium.sh
	@$(BIN)/python -m pytest -m browser tests/browser

check: ready  ## lint, types and the tests of the house rules
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy $(RELAXED) tests
	@$(BIN)/python -m pytest -q tests/test_house.py

notebooks: ready  ## build the notebooks from their sources and run them
	@$(BIN)/python scripts/build_notebooks.py

figures: ready  ## the pictures of README.md
	@$(BIN)/python scripts/make_figures.py

bench: ready  ## speed and memory, beside what people use today
	@$(BIN)/workbench bench

gpu-check:  ## everything that needs a GPU, with the torch and vllm of PYTHON as they are
	@PYTHONPATH=. $(PYTHON) scripts/gpu_check.py

clean:  ## remove what was made here, the environment too
	@rm -rf "$(VENV)" .workbench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis workbench.egg-info workbench-report.html
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
