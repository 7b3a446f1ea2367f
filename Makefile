# Two commands matter: make demo, make test. Both make the environment first and work offline once it is there.
PYTHON ?= python3
VENV ?= .venv
# Where pip looks for torch: on a machine without a CPU wheel at hand, TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Two test processes with one thread each are faster than one process with two.
PARALLEL := OMP_NUM_THREADS=1

.PHONY: demo test test-all lint types docs faults clean

demo: $(INSTALLED)  ## what zoo:planted rewards, beside the ground truth: demo/report.html
	$(BIN)/rmscope demo --out demo

test: $(DEV)  ## the test suite, without what is marked slow
	$(PARALLEL) $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(DEV)  ## all tests, as a nightly job runs them
	$(PARALLEL) $(BIN)/python -m pytest -n 2 --dist loadfile -m ""

faults: $(DEV)  ## kills, flipped bits, malformed inputs, broken checkpoints, two processes: hours; nothing may be lost
	$(BIN)/python -m benchmarks.faults

lint: $(DEV)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

types: $(DEV)
	$(BIN)/mypy

docs: $(DEV)  ## the docs site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(INDEX) -c constraints.txt -e .
	touch $@

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install -q $(INDEX) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
