# Needs make and Python 3.11 or newer; all else goes into .venv. `make` alone lists what there is to do.

# The first one found that is new enough; name another with `make install PYTHON=/path/to/python3`.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

BIN := .venv/bin
INSTALLED := .venv/.motet-installed
BENCHES := $(patsubst %,bench/%.py,tax fusion latency interactive storage memory scale dispatch rivals simulate growth truth slow)

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint format bench env compose-test clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | while IFS=@ read -r name text; do \
		printf '%-20s%s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## make .venv and install motet with all extras into it, once

demo: $(INSTALLED) ## start a whole cluster, run a real job on it, print the merged table, stop
	$(BIN)/motet demo

test: $(INSTALLED) ## run all tests; those that need a GPU skip themselves where there is none
	$(BIN)/python -m pytest

check: lint test ## everything that CI asks for

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

env: ## make secrets/ and .env for docker compose, once; needs Python alone
	@$(or $(PYTHON),python3) deploy/compose/prepare.py

compose-test: $(INSTALLED) ## prove docker-compose.yml on a real engine: start, kill, scale, take down (minutes)
	$(BIN)/python tests/compose/check.py

clean: ## remove .venv and all caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || { \
		echo 'motet needs Python 3.11 or newer, and found none; name it with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo '$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'installing motet and PyTorch into .venv (once, about 1.6 GB) …'
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile -q -e '.[dev]'
	@touch $@
	@echo 'motet is installed; see: make demo, $(BIN)/motet --help'
