# `make demo` and `make test` work on a machine with Python 3.11+ and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all soak lint wheel clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## ResNet and ViT on real images, with ChannelDropBack and without.
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## What every change must pass.
	JAX_PLATFORMS=cpu $(BIN)/pytest -n 2 -m "not slow and not soak"

test-all: $(VENV)/.installed  ## The slow tests too.
	JAX_PLATFORMS=cpu $(BIN)/pytest -n 2 -m "not soak"

soak: $(VENV)/.installed  ## Twenty kills and twenty thousand steps: many minutes.
	JAX_PLATFORMS=cpu $(BIN)/pytest tests/test_soak.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.installed  ## Builds the wheel, and imports it beside its core dependencies only.
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet dist/*.whl
	cd build && JAX_PLATFORMS=cpu wheel-venv/bin/python -c "import sys, cdb_jax; assert 'flax' not in sys.modules; print('cdb_jax', cdb_jax.__version__)"

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
