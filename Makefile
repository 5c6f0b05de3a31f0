# make demo [PROMPT="…"]   a picture from the bundled model
# make test                the tests
# make check               formatting, lint, types
# make bench               speed against diffusers on this machine, with the quality it costs
# make bench-suites        times operations, blocks, steps, stages, pictures and cold starts one by one
# make gpu                 kernels, then tiers, memory budgets and steps of FLUX.2 at full size on this machine's NVIDIA card
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PROMPT ?= a lighthouse at dusk
PIP = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check bench bench-suites gpu clean

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# An install is repeated only when what it installs from has changed.
$(VENV)/.demo: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo $(VENV)/.test

$(VENV)/.bench: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) --editable '.[test,bench]'
	touch $@ $(VENV)/.demo $(VENV)/.test

demo: $(VENV)/.demo
	$(BIN)/flux2-local "$(PROMPT)"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -m alone

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.speed

bench-suites: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/suites --benchmark-columns=median,iqr,rounds

gpu: $(VENV)/.bench
	$(BIN)/python scripts/gpu.py

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache
