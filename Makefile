# Everything runs in .venv, made on first use from pyproject.toml and constraints.txt. Needs Python 3.12, git and make.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_PROCESSES ?= 4
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

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
# The type checker cannot follow package-dir, so it sees the import tree as links: build/types/pipehc/{schedules,comm,...}.
	rm -rf build/types && mkdir -p build/types/pipehc
	ln -s $(CURDIR)/pipehc/* build/types/pipehc/
	ln -s $(addprefix $(CURDIR)/,schedules comm kernels recompute) build/types/pipehc/
	MYPYPATH=build/types $(BIN)/mypy -p pipehc

clean:
	rm -rf $(VENV) runs
