# make demo | make test | make check: each sets up everything it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_RUNS ?= runs

.PHONY: setup demo test test-faults punish lint types check bench sandbox clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "medgen needs Python 3.10 or later; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/medgen submit jobs/demo.yaml --local

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not slow"

# every fault of tests/faults/matrix.py, made to happen; writes the table of docs/reliability.md
test-faults: $(READY)
	MEDGEN_WRITE_RELIABILITY=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "fault or slow"

# one small graph again and again on a real Slurm under random faults; needs root, or a SLURM_CONF to use
MINUTES ?= 30
punish: $(READY)
	$(BIN)/python -m tests.faults.punisher --minutes $(MINUTES)

lint: $(READY)
	$(BIN)/ruff check medgen tests benchmarks cluster

types: $(READY)
	$(BIN)/mypy

check: lint types test

bench: $(READY)
	$(BIN)/python -m benchmarks

# a real Slurm of two nodes on this machine; needs root, and no .venv
sandbox:
	@$(PYTHON) cluster/sandbox/sandbox.py install
	@$(PYTHON) cluster/sandbox/sandbox.py up

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
