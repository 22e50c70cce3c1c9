# Two commands do everything from a bare Python 3.11 or newer: make demo, make test.
# Each sets up .venv itself, once, and does nothing twice.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two processes; tests/conftest.py shares the files between them.
TESTS := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder

# Hundreds of processes of the tests import our package: the first compiles it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-all checks lint types layers unit docs format lock lock-cpu audit fuzz clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet uv

$(READY): requirements.lock pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	@touch $(READY)

setup: $(READY)  ## make .venv with everything in it
	@echo 'ready: source .venv/bin/activate, then agr-ray --help'

demo: $(READY)  ## render faces, prepare, train, evaluate, calibrate and score: under five minutes on two cores
	$(BIN)/agr-ray demo

test: $(READY) checks  ## lint, types, layers and every test but the slow ones
	$(TESTS) -m "not slow"

test-all: $(READY) checks  ## every test
	$(TESTS)

unit: $(READY)  ## the quick tests that need no Ray, about a minute
	$(TESTS) tests/unit -m "not slow and not long"

checks: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 types lint layers

docs: $(READY)  ## build the documentation site: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

lint: $(READY)  ## style, spelling and vocabulary
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/python tools/vocabulary.py

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

format: $(READY)  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(BIN)/uv  ## pin and hash the newest set that fits pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --upgrade --group dev \
		--custom-compile-command "make lock" pyproject.toml -o requirements.lock
	echo uv | $(BIN)/uv pip compile --quiet --universal --generate-hashes --upgrade \
		--custom-compile-command "make lock" - -o cluster/docker/installer.lock

lock-cpu: $(BIN)/uv  ## pin and hash PyTorch's builds without CUDA, for the CPU variant of the container image
	grep -E '^torch(vision)?==' requirements.lock | tr -d '\\' | $(BIN)/uv pip compile --quiet --no-deps \
		--generate-hashes --torch-backend cpu --custom-compile-command "make lock-cpu" - -o cluster/docker/torch-cpu.lock

audit: $(BIN)/uv  ## look up the known vulnerabilities of all locked dependencies; asks a service on the internet
	$(BIN)/uv tool run pip-audit --require-hashes --disable-pip --requirement requirements.lock

fuzz: $(READY)  ## feed a million hostile inputs to the parsers: 6 to 20 minutes of one core
	$(BIN)/python benchmarks/fuzz.py --inputs 1000000

clean:  ## remove what the targets made
	rm -rf .venv demo-out site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
