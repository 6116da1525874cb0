# Everything runs in .venv, made on first use from pyproject.toml and constraints.txt. Needs Python 3.12, git and make.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_PROCESSES ?= 4
JOBS ?= $(shell nproc)
export OMP_NUM_THREADS ?= 1
# Many tests are several processes, each of which would compile our sources again.
unexport PYTHONDONTWRITEBYTECODE

# What `make gpu-check` needs beside PyTorch, Triton and Megatron-core: nothing that would bring a PyTorch along.
LIGHT := hypothesis numpy nvtx packaging psutil pydantic pytest pytest-timeout pytest-xdist pyyaml rich setuptools

.PHONY: demo test test-all lint bench gpu-check wheels clean

ifndef SYSTEM
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 10 --upgrade pip
	$(BIN)/python -m pip install --quiet --retries 10 --constraint constraints.txt --editable '.[test,viz]'
	touch $(READY)
else
# SYSTEM=1: PyTorch, Triton and whatever else $(PYTHON) has are used as they are; only what it lacks is installed. A .pth file names
# its packages, not --system-site-packages: that would name those of the interpreter that $(PYTHON) may be a venv of.
$(READY): pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --retries 10 $(LIGHT)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --retries 10 --no-deps megatron-core --editable .
	touch $(READY)
endif

# Trains a small mHC mixture-of-experts transformer with DualPipe over four processes, on the Python sources of this interpreter.
demo: $(READY)
	$(BIN)/torchrun --standalone --nproc-per-node $(DEMO_PROCESSES) -m pipehc.train --config configs/cpu_demo.yaml $(ARGS)

# Tests on every core, and then, alone, those that compare times: what fails of them is measured once more, since other work on the
# machine spoils one measurement, a fault of ours both. Where ARGS leave nothing to run, pytest says 5.
TESTS = $(BIN)/python -m pytest
TIMED = -m "timed and not slow"
test: $(READY)
	$(TESTS) -n $(JOBS) -m "not slow and not timed" $(ARGS) || [ $$? = 5 ]
	$(TESTS) $(TIMED) $(ARGS) || [ $$? = 5 ] || $(TESTS) $(TIMED) --last-failed $(ARGS)

test-all: TIMED = -m timed
test-all: $(READY)
	$(TESTS) -n $(JOBS) -m "not timed" $(ARGS) || [ $$? = 5 ]
	$(TESTS) $(TIMED) $(ARGS) || [ $$? = 5 ] || $(TESTS) $(TIMED) --last-failed $(ARGS)

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

# On a machine with a GPU: trainings over one process and over four, every kernel test, kernel times; one report.
gpu-check: $(READY)
	$(BIN)/python tools/gpu_check.py $(ARGS)

# What a machine without network needs, into a folder: there, `PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make gpu-check`, with SYSTEM=1 in
# both places if it has its own PyTorch and Triton. To be made where Python and processor are the same.
WHEELS ?= wheels
DOWNLOAD := $(PYTHON) -m pip download --quiet --retries 10 --dest $(WHEELS) --constraint constraints.txt
wheels:
ifndef SYSTEM
	$(DOWNLOAD) '.[test,viz]' pip setuptools
else
	$(DOWNLOAD) $(LIGHT)
	$(DOWNLOAD) --no-deps megatron-core
endif

clean:
	rm -rf $(VENV) runs
