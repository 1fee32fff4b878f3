# The project's commands; `make help` lists them.

# The first Python on this machine that is new enough.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
BIN := .venv/bin
# The pip of .venv if it has one, else that of $(PYTHON).
PIP = $$(ls $(BIN)/pip 2>/dev/null || echo $(PYTHON) -m pip --python $(BIN)/python)
# The files pin every package, so pip has nothing to resolve; a test checks that they are complete.
INSTALL = $(PIP) install --quiet --disable-pip-version-check --no-deps
# Tests mostly wait, so four processes keep two processors busy.
PYTEST := $(BIN)/python -m pytest -n 4 --dist loadgroup --no-loadscope-reorder
BEGAN := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help install run check test lint measure bench chaos pressure up down

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## Create .venv and install what running needs.

# A pip in .venv would take as long to install as all the rest. So .venv gets one only if the pip of
# $(PYTHON) cannot install into another environment, which takes pip 22.3.
.venv/installed: requirements.txt requirements-run.txt
	@if [ -z "$(PYTHON)" ]; then echo "make: no Python 3.11 or newer found; set PYTHON=/path/to/python3" >&2; exit 1; fi
	@echo $(STEP) "installing (up to a minute, once)"
	@$(PYTHON) -m venv --clear --without-pip .venv && \
	{ $(PYTHON) -m pip --python $(BIN)/python --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; } || \
	{ echo "make: $(PYTHON) cannot make .venv, see above; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@$(INSTALL) -r requirements.txt -r requirements-run.txt
	@touch $@

.venv/dev-installed: .venv/installed requirements-dev.txt
	@echo "installing what checks and tests need"
	@$(INSTALL) -r requirements-dev.txt
	@touch $@

.venv/bench-installed: .venv/dev-installed requirements-bench.txt
	@echo "installing what the benchmark needs"
	@$(INSTALL) -r requirements-bench.txt
	@touch $@

run: ## Start the service, PostgreSQL and the sandbox; Ctrl-C stops all.
	@$(MAKE) --no-print-directory --question .venv/installed && echo "1/4 installed already" || \
	$(MAKE) --no-print-directory .venv/installed STEP=1/4
	@exec $(BIN)/python -m tools.dev.run $(BEGAN)

check: lint ## Check the style and types, and run every test that needs no server; takes a minute.
	$(PYTEST) -m "not servers"

test: lint ## Check the style and types, and run every test; takes nine minutes.
	$(PYTEST)

lint: .venv/dev-installed ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

measure: install ## Measure how late changes are seen and what outages cost; takes two minutes.
	@exec $(BIN)/python -m tools.measure

chaos: install ## Break everything around the service under load, and check what must hold; takes three minutes.
	@exec $(BIN)/python -m tools.chaos

pressure: install ## Put the service under outside pressure, alone or beside another checkout: BESIDE=FOLDER.
	@exec $(BIN)/python -m tools.pressure $(if $(BESIDE),--beside '$(BESIDE)')

bench: .venv/bench-installed ## Measure the service beside comparable stacks, or beside another checkout: BESIDE=FOLDER, QUICK=1.
	@exec $(BIN)/python -m tools.bench $(if $(BESIDE),--beside '$(BESIDE)') $(if $(QUICK),--quick)

up: ## Start everything in containers: as make run does, and Prometheus.
	docker compose up --build --detach --wait
	@echo "sandbox http://127.0.0.1:9090/, service http://127.0.0.1:8080/, Prometheus http://127.0.0.1:9095/"

down: ## Stop the containers and keep the stored data.
	docker compose --profile '*' down
