# Each target makes .venv on its first run and uses it from then on; `make` alone prints the targets.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo chat test lint clean

help:
	@echo "make demo    train the embedded model, test it, and chat with it in the browser"
	@echo "make chat    chat at once, on the model that ships"
	@echo "make test    run the tests"
	@echo "make lint    check style and types"
	@echo "make clean   remove .venv, build outputs and caches; runs/ stays"
	@echo
	@echo "Options of a command go into ARGS: make demo ARGS='--seed 1', make test ARGS='tests/lm -q'."
	@echo "Another interpreter, 3.11 or newer: make clean, then make demo PYTHON=python3.12."

demo: .venv/.installed
	$(BIN)/visplice demo $(ARGS)

chat: .venv/.installed
	$(BIN)/visplice chat $(ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv build dist visplice.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are the last thing written, so that an interrupted install is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "installing visplice into .venv (minutes the first time)"
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	@$(make-venv)
	@echo "installing visplice and what its tests need into .venv (minutes the first time)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch .venv/.installed $@

# An environment that has no working pip is half made: it is made anew.
define make-venv
$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	command -v "$(PYTHON)" >/dev/null || { \
		echo "there is no $(PYTHON) here; name one that is 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "visplice needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another:" \
			"make PYTHON=python3.12 ..." >&2; exit 1; }; \
	"$(PYTHON)" -m venv --clear .venv; }
endef
