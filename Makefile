# Everything runs in .venv, made on first use from pyproject.toml and constraints.txt. Needs Python 3.12, git and make.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_PROCESSES ?= 4
JOBS ?= $(shell nproc)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint bench gpu-check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 10 --upgrade pip
	$(BIN)/python -m pip install --quiet --retries 10 --constraint constraints.txt --editable '.[test,viz]'
	touch $(READY)

# Trains a small mHC mixture-of-experts transformer with DualPipe over four processes, on the Python sources of this interpreter.
demo: $(READY)
	$(BIN)/torchrun --standalone --nproc-per-node $(DEMO_PROCESSES) -m pipehc.train --config configs/cpu_demo.yaml $(ARGS)

# Tests on every core, and then, alone, those that compare times. Where ARGS leave nothing to run, pytest says 5.
TESTS = $(BIN)/python -m pytest
test: $(READY)
	$(TESTS) -n $(JOBS) -m "not slow and not timed" $(ARGS) || [ $$? = 5 ]
	$(TESTS) -m "timed and not slow" $(ARGS) || [ $$? = 5 ]

test-all: $(READY)
	$(TESTS) -n $(JOBS) -m "not timed" $(ARGS) || [ $$? = 5 ]
	$(TESTS) -m timed $(ARGS) || [ $$? = 5 ]

lint: $(READY)
	$(BIN)/ruff check .
# Type checker and import linter cannot follow package-dir, so they see a copy of the import tree: pipehc/{schedules,comm,...}.
	rm -rf build/imports && mkdir -p build/imports
	cp -r pipehc build/imports/ && cp -r schedules comm kernels recompute build/imports/pipehc/
	MYPYPATH=build/imports $(BIN)/mypy -p pipehc
	cd build/imports && $(CURDIR)/$(BIN)/lint-imports --no-cache --no-logo ../../pyproject.toml

# Counted traffic and compiled resources of the kernels, their times on a GPU, schedulers over sleeping stages, searched schedules.
bench: $(READY)
	$(BIN)/python tools/kernel_report.py
	$(BIN)/python tools/bench_kernels.py
	$(BIN)/python tools/bench_schedules.py $(if $(filter 0,$(shell id -u)),--realtime)
	$(BIN)/python tools/auto_table.py

KERNEL_TESTS := $(patsubst %,tests/kernels/test_%.py,coefficients pre coefficients_pre post_res post_res_pre birkhoff isometric \
	hybrid identity_offset harmonized tiles) tests/model/test_hyper_connection.py
gpu-check: $(READY)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest $(KERNEL_TESTS) $(ARGS) && \
	  $(BIN)/torchrun --standalone --nproc-per-node 1 -m pipehc.train --config configs/cpu_demo.yaml parallel.pp=1 \
	    schedule.name=1f1b train.precision=bf16 train.steps=20 run.folder=runs/gpu_check checkpoint.resume=never && \
	  if $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 4)'; then \
	    $(BIN)/torchrun --standalone --nproc-per-node 4 -m pipehc.train --config configs/cpu_demo.yaml recompute.enabled=true \
	      train.precision=bf16 train.steps=20 'trace.steps=[10,10]' run.folder=runs/gpu_check_4 checkpoint.resume=never; \
	  else echo "fewer than four GPUs: messages between them are not checked"; fi; \
	else echo "no CUDA device here: nothing to check"; fi

clean:
	rm -rf $(VENV) runs
