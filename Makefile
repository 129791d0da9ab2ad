PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow matrix cluster gpu setup setup-dev lint bench clean

# Install, then train the built-in default on scikit-learn's digits.
demo: setup
	$(BIN)/kexue fit

# Everything but the tests marked slow, gpu or cluster.
test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not cluster"

slow: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not long"

# Every technique and pair on every base and module: a quarter of an hour on two cores.
matrix: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

# Jobs on a private SLURM of two nodes; needs root, and: apt-get install slurm-wlm munge
cluster: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

# On a CUDA device; the rest of the tests need none.
gpu: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_all.py

# `setup` makes .venv with .venv/bin/kexue; a second call does nothing until a requirement changes.
setup: $(VENV)/.runtime
setup-dev: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kexue needs Python 3.11 or newer; say: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; say: apt-get install python3-venv"; exit 2; }

# DeepSpeed's set-up reads torch, and so must find it installed: it is built without isolation, after the rest.
$(VENV)/.runtime: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
