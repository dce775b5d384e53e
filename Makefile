# Two commands matter: `make demo` and `make test`. Both make the environment first.
VENV ?= .venv
PYTHON ?= python3
DEMO ?= demo
BIN := $(VENV)/bin

.PHONY: demo test check format install clean

demo: $(VENV)/.ready
	$(BIN)/synth-agent demo $(DEMO) $(if $(HEADLESS),--headless)

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt install.sh
	sh install.sh $(VENV) $(PYTHON)

clean:
	rm -rf $(VENV) $(DEMO)
