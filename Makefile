# Every command of the project; `make help` lists them.

# The first Python on this machine that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Runs a command on the DB_* of the environment, on `make run`'s own database when DB_HOST is unset.
WITH_DATABASE := $(BIN)/python -m tools.dev.postgres
# Much of what tests do is waiting, so that four processes keep two processors busy.
PYTEST := $(BIN)/python -m pytest -n 4 --dist loadgroup --no-loadscope-reorder
FLASK := $(BIN)/flask --app notifier.app

.DEFAULT_GOAL := help
.PHONY: help install run check test lint measure bench chaos migrate rollback providers up down

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## Create .venv and install what is pinned.

.venv/installed: requirements.txt requirements-dev.txt
	@if [ -z "$(PYTHON)" ]; then echo "make: no Python 3.11 or newer found; set PYTHON=/path/to/python3" >&2; exit 1; fi
	@$(PYTHON) -m venv --clear .venv || { echo "make: $(PYTHON) -m venv failed, see above; Debian and Ubuntu have it in python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

run: install ## Start the service, PostgreSQL and four mock providers; Ctrl-C stops all.
	@exec $(BIN)/python -m tools.dev.run

check: install lint ## Check the style and types, and run every test that needs no server; takes a minute.
	$(PYTEST) -m "not servers"

test: install lint ## Check the style and types, and run every test; takes five minutes.
	$(PYTEST)

lint: install ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

measure: install ## Measure how late changes are seen and what outages cost; takes two minutes.
	@exec $(BIN)/python -m tools.measure

chaos: install ## Break everything around the service under load, and check what must hold; takes three minutes.
	@exec $(BIN)/python -m tools.chaos

bench: .venv/bench-installed ## Measure the service beside comparable stacks, or beside another checkout: BESIDE=FOLDER, QUICK=1.
	@exec $(BIN)/python -m tools.bench $(if $(BESIDE),--beside '$(BESIDE)') $(if $(QUICK),--quick)

.venv/bench-installed: .venv/installed requirements-bench.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

migrate: install ## Bring the database's schema up to date.
	@$(WITH_DATABASE) $(FLASK) migrate

rollback: install ## Undo the last migration.
	@$(WITH_DATABASE) $(FLASK) rollback

providers: install ## List the providers.
	@$(WITH_DATABASE) $(FLASK) providers list

up: ## Start everything in containers: as make run does, and Prometheus.
	docker compose up --build --detach --wait
	@echo "service http://127.0.0.1:8080/, mock providers http://127.0.0.1:9090/ to 9093, Prometheus http://127.0.0.1:9095/"

down: ## Stop the containers; what is stored stays.
	docker compose --profile '*' down
