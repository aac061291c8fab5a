# make run: fine-tune the embedded model by executing every notebook; results in out/
# make test: the whole test suite
# make check: lint and types

# the first of these that exists; or give one: make run PYTHON=/usr/bin/python3.12
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	command -v $(p) >/dev/null 2>&1 && $(p) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $(p))))
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= out
# processes that the tests are divided among, of one thread and up to 3 GB each; file by file
WORKERS ?= 2

.PHONY: run test check format clean

run: $(VENV)/.installed
	$(BIN)/python notebooks/run_all.py --out $(OUT) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# a stamp per step, so that a second run starts at once
$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing (about 2 minutes and 3 GB the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache .mypy_cache colab_qlora.egg-info
