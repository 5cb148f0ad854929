# `make quickstart` trains, compares, pushes and reloads an adapter on real data; `make test` runs the tests.
# Both make a virtual environment in .venv first and do nothing twice.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: with a second busy process, two threads on two cores are up to fifteen times slower.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup quickstart test conformance versions quantised zero kernels gpu lint types bench clean

help: ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## make the virtual environment

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (about two minutes and 2 GB the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,oracles]' -c constraints.txt 2>&1 | { grep -v 'is ignored' || true; }
	$(BIN)/python -c "import peft_subspace; print('peft_subspace', peft_subspace.__version__, 'is ready')"
	@touch $@

quickstart: setup ## fine-tune MiniLM on TREC with FLoRA and LoRA, push, reload, export (under 8 minutes)
	$(BIN)/python examples/quickstart.py

test: setup ## run the tests
	$(BIN)/python -m pytest -q -n 2

conformance: setup ## run PEFT's own test-suite against our configs
	$(BIN)/python tests/conformance/run.py -n 2

# A machine with the older builds of torch can test its lowest version too: make versions TORCH_LOWEST=2.6.0
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_LOWEST ?= $(TORCH)

versions: setup ## a sample of the tests with the lowest and the newest allowed versions, in environments of their own (slow)
	test -d $(VENV)-lowest || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -q --disable-pip-version-check -e . 'torch==$(TORCH_LOWEST)' pytest pytest-xdist \
		-c tests/versions/lowest.txt 2>&1 | { grep -v 'is ignored' || true; }
	$(VENV)-lowest/bin/python -m pytest -q tests/versions
	test -d $(VENV)-newest || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager -e . \
		'torch==$(TORCH)' pytest pytest-xdist diffusers 2>&1 | { grep -v 'is ignored' || true; }
	$(VENV)-newest/bin/python -m pytest -q tests/versions tests/contract/test_scale.py -k 'not test_scale or diffusers'

quantised: setup ## the tests on quantised bases, in an environment of their own
	test -d $(VENV)-quantised || $(PYTHON) -m venv $(VENV)-quantised
	$(VENV)-quantised/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' 'bitsandbytes==0.50.2' \
		'torchao==0.18.0' -c constraints.txt 2>&1 | { grep -v 'is ignored' || true; }
	$(VENV)-quantised/bin/python -m pytest -q tests/quantised

zero: setup ## the tests with DeepSpeed ZeRO-3 in two CPU processes, in an environment of their own
	test -d $(VENV)-zero || $(PYTHON) -m venv $(VENV)-zero
	$(VENV)-zero/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' 'deepspeed==0.19.8' \
		-c constraints.txt 2>&1 | { grep -v 'is ignored' || true; }
	$(VENV)-zero/bin/python -m pytest -q tests/distributed/test_zero.py

kernels: setup ## the tests of the Triton kernels by its interpreter, in an environment of their own
	test -d $(VENV)-kernels || $(PYTHON) -m venv $(VENV)-kernels
	$(VENV)-kernels/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' 'triton==3.9.0' \
		-c constraints.txt 2>&1 | { grep -v 'is ignored' || true; }
	TRITON_INTERPRET=1 TRITON_DEFAULT_FP_FUSION=1 $(VENV)-kernels/bin/python -m pytest -q tests/functional/test_triton.py

gpu: setup ## what needs a GPU: the tests, and figures in benchmarks/results
	$(BIN)/python -m pytest -q -rs tests/gpu
	$(BIN)/python benchmarks/gpu.py

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy
	$(BIN)/mypy

bench: setup ## the step benchmark on one thread
	$(BIN)/python benchmarks/step.py

clean: ## remove the environment and build outputs
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache
