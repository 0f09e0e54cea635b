# SPDX-License-Identifier: GPL-3.0-or-later
# The two commands to know: `make run` and `make test`. Each sets up all it needs from the lock files.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
N ?= 5
# Many tests wait for real nodes and brokers: more of them at once than there are cores.
WORKERS ?= 3
# The newest Python that really runs: a version manager may put a name on PATH that answers "not found".
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help run test lint format bench lock schemas build fleet-up fleet-down clean

help: ## Show what can be done
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.run: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Node Manager needs Python 3.11 or newer with the venv module; none was found." >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.run
	@echo "Adding the development tools ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

run: $(VENV)/.run ## Set up and start the manager, watching this machine as its first node
	@exec $(BIN)/nodectl serve --local

test: $(VENV)/.dev ## Set up and run all tests (ARGS="-k name" narrows)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev ## Run every linter, all must be clean
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/yamllint --strict .
	@$(BIN)/ansible-lint --offline
	@$(BIN)/python tests/sanity/run.py

format: $(VENV)/.dev ## Format the Python files
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure what the docs claim, side by side
	@for bench in tests/bench/[a-z]*.py; do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

lock: $(VENV)/.dev ## Renew the lock files from pyproject.toml (needs uv on PATH)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--no-header --group build pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--no-header -c requirements.lock --group dev pyproject.toml -o requirements-dev.lock

schemas: $(VENV)/.run ## Write the JSON Schemas and the reference of the configuration from the models
	@$(BIN)/python -m node_manager.schemas

build: $(VENV)/.dev ## Build the wheel and the collection into dist/
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	@$(BIN)/ansible-galaxy collection build --force --output-path dist .

fleet-up: $(VENV)/.dev ## Start N test nodes (systemd in Docker, SSH on 127.0.1.x)
	@$(BIN)/python -m tests.fleet up $(N)

fleet-down: $(VENV)/.dev ## Stop and remove the test nodes
	@$(BIN)/python -m tests.fleet down

clean: ## Remove the environment and all build results (keeps var/)
	rm -rf $(VENV) dist build .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
