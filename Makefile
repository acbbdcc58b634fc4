# `make demo` and `make test` need Python 3.10 or newer with its headers and venv, and a C++ compiler (for the simulated
# accelerator). They make their own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/python -m prefetch_offload.cli demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The stamp comes last: an install that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plot]'
	@touch $@

clean:
	rm -rf $(VENV) demo-output
