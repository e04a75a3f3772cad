# Every target does its own set-up; a second call finds the stamp and starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements/cpu.txt
UV := $(BIN)/uv
UV_VERSION := 0.13.9
FLOORS := platform kernels actors pipelines cluster
FARM := build/typing/fewstep

# One thread a process and passive waiting: several processes share few cores (docs/decisions/0006-colocated-loop.md).
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

# Where torch's CPU build comes from: a folder of wheels if pip has been told of one, else PyTorch's own index.
# pip separates several places by spaces, uv by commas.
empty :=
space := $(empty) $(empty)
comma := ,
ifneq ($(strip $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS := $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
TORCH :=
else
TORCH := --torch-backend=cpu
endif

# A certificate that pip has been told to trust, uv must trust too.
ifneq ($(PIP_CERT),)
$(STAMP) lock: export SSL_CERT_FILE ?= $(PIP_CERT)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint types bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## set up .venv from the lock file

# Compiled at once: every Ray worker imports torch, and ray.init takes 5 s with bytecode, 10 s without.
$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "make: got Python %d.%d; allowed: 3.11 or newer; fix: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(UV) pip install --python $(BIN)/python --compile-bytecode --no-deps $(TORCH) -r $(LOCK) -e .
	$(UV) pip check --python $(BIN)/python
	@touch $(STAMP)

demo: $(STAMP)  ## the main job, start to end; report in runs/demo
	$(BIN)/fewstep demo --out runs/demo

# In two halves, since two cores are what there is everywhere: 17 minutes, against half an hour one after the other. The
# second half's output is kept and shown when it ends.
SECOND := tests/chaos tests/cluster tests/contract
test: $(STAMP)  ## every test; what is skipped is listed with its reason
	@mkdir -p build; trap 'kill $$other 2> /dev/null' INT TERM; \
	$(BIN)/python -m pytest -ra --durations=15 $(TESTS) $(SECOND) > build/test-second.log 2>&1 & other=$$!; \
	$(BIN)/python -m pytest -ra --durations=15 $(TESTS) tests $(addprefix --ignore=,$(SECOND)); first=$$?; \
	wait $$other; second=$$?; cat build/test-second.log; \
	[ $$first -eq 0 ] && [ $$second -eq 0 ]

check: lint types  ## what a commit must pass: lint, format, types

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# No checker follows setuptools' folder mapping, so mypy sees the floors through links (pyproject.toml, tool.mypy).
types: $(STAMP)  ## mypy --strict
	@mkdir -p $(FARM)
	@for floor in $(FLOORS); do ln -sfn ../../../$$floor $(FARM)/$$floor; done
	@ln -sfn ../../../cluster/cli/__main__.py $(FARM)/__main__.py
	$(BIN)/mypy

bench: $(STAMP)  ## measure the engine and the sandbox; results in bench/results
	$(BIN)/python bench/run.py

# The markers let one lock serve Linux, where `+cpu` keeps the CUDA build out and triton has wheels, and other systems.
lock: $(STAMP)  ## resolve pyproject.toml again into the lock file
	$(UV) pip compile pyproject.toml --extra test --extra dev --python-version 3.11 --quiet \
		--no-header --no-emit-index-url $(TORCH) --output-file $(LOCK) > /dev/null
	sed -i -E -e 's/^torch==([0-9.]+)(\+cpu)?$$/torch==\1+cpu ; sys_platform == "linux"\ntorch==\1 ; sys_platform != "linux"/' \
		-e 's/^triton==[0-9.]+$$/& ; sys_platform == "linux"/' $(LOCK)

clean:  ## remove everything that can be made again, runs excepted
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(FLOORS) tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
