# Set-up, tests and the quick start. Needs Python >= 3.11, a C++ compiler and make; nothing needs root,
# though `make test` as root on Debian or Ubuntu installs Slurm too (tests/cluster/install.sh).
#
#   make quickstart      environment, Horovod, then a two-process training run on handwritten digits
#   make venv            .venv with pinned packages and this package (editable)
#   make horovod         Horovod for the torch in .venv; GPU=1 builds it with NCCL
#   make test            set-up, lint, types, the whole test suite
#   make lint | types | clean

VENV ?= .venv
GPU ?= 0
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
comma := ,
EXTRAS := mpi,dali,digits,build,dev$(if $(filter 1,$(GPU)),$(comma)gpu)
PACKAGES := $(VENV)/.packages-gpu$(GPU)
HOROVOD := $(VENV)/.horovod-gpu$(GPU)

.PHONY: venv horovod quickstart test lint types clean
.DELETE_ON_ERROR:

venv: $(PACKAGES)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on PATH: set PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot create environments: install its venv package or set PYTHON=" >&2; exit 2; }

$(PACKAGES): pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing packages into $(VENV) (a few minutes the first time)"
	$(PIP) install --quiet -c constraints.txt 'setuptools<81' wheel
	$(PIP) install -c constraints.txt --no-build-isolation --progress-bar off -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.packages-gpu* && touch $@

horovod: $(HOROVOD)

$(HOROVOD): $(PACKAGES) $(wildcard hpctrain/build_horovod/*.py)
	@echo "== Horovod: from the cache, or built from its source"
	@$(BIN)/python -m hpctrain.build_horovod $(if $(filter 1,$(GPU)),--gpu)
	@rm -f $(VENV)/.horovod-gpu* && touch $@

quickstart: horovod
	@echo "== training on handwritten digits, two processes"
	$(BIN)/horovodrun -np 2 hpctrain train configs/quickstart.yaml

lint: venv
	$(BIN)/ruff check hpctrain tests benchmarks
	$(BIN)/ruff format --check hpctrain tests benchmarks

types: venv
	$(BIN)/mypy

# Root on Debian gets Slurm for tests/cluster too; elsewhere these say what is missing. They wait most of their time, so
# three of their files run side by side, each on a cluster of its own, in the order of tests/cluster/conftest.py.
test: horovod lint types
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then tests/cluster/install.sh || \
		echo "== tests/cluster/install.sh failed: see the reasons of skipped tests"; fi
	$(BIN)/python -m pytest --ignore tests/cluster
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder tests/cluster

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hpctrain tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
