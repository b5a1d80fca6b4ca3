# Two targets do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check soak bench setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/setup.sh
	touch $@

demo: setup
	$(BIN)/tdml-peer demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/codespell

test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

soak: setup
	$(BIN)/python -m tests.testnet --draw 1 --minutes 10

bench: setup
	for bench in bench/*.py; do $(BIN)/python -m bench.$$(basename $$bench .py) --json || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
