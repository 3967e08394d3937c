# `make demo` and `make test` work on a machine with Python 3.11+ and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_STEPS := vit_s/16:224:64 vit_b/16:224:64 vit_l/16:224:64 blocks2048/16:512:8 resnet50:224:64

.PHONY: demo test test-all soak evidence gpu-check accelerator-check models-check cluster-check lint docs notebook wheel clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## What each method costs and saves, for a ResNet and a ViT on digits.
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## What every change must pass.
	JAX_PLATFORMS=cpu $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not soak"

test-all: $(VENV)/.installed  ## The slow tests too.
	JAX_PLATFORMS=cpu $(BIN)/pytest -n 2 --dist worksteal -m "not soak"

soak: $(VENV)/.installed  ## Twenty kills, processes that die, twenty thousand steps: twenty minutes.
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/soak.py

evidence: $(VENV)/.installed  ## Hours: all methods tuned and compared; stopped, it goes on.
	for grid in core masks ablation compact speed; do \
	  $(BIN)/python benchmarks/evidence/run.py $$grid || exit 1; \
	done
	$(BIN)/python benchmarks/evidence/report.py
	$(BIN)/python benchmarks/evidence/time_to_accuracy.py

gpu-check:  ## Needs a GPU and a Python with jax, flax and optax: first the same results, then the times.
	$(PYTHON) benchmarks/gpu_check.py
	$(PYTHON) benchmarks/freezing.py
	$(PYTHON) benchmarks/size.py
	$(PYTHON) benchmarks/depth.py --steps $(GPU_STEPS) --dtype bfloat16
	$(PYTHON) benchmarks/methods.py --steps $(GPU_STEPS) --dtype bfloat16
	$(PYTHON) benchmarks/overhead.py
	$(PYTHON) benchmarks/skipping.py --steps $(GPU_STEPS) --dtype bfloat16 --optimizers adamw --rates 0.5

accelerator-check:  ## Counts what a step costs on an H100 and a TPU v5e, compiled without them: hours.
	$(PYTHON) -m venv build/accelerators
	build/accelerators/bin/pip install --quiet jax==0.10.2 jax-cuda12-plugin==0.10.2 libtpu flax optax
	build/accelerators/bin/python benchmarks/accelerators.py

cluster-check: $(VENV)/.installed  ## The job for Kubernetes, and train.py under a real Slurm; as root, on Debian.
	$(BIN)/pip install --quiet kubernetes-validate
	$(BIN)/kubernetes-validate --strict examples/cluster/train.yaml
	apt-get install -y -qq --no-install-recommends slurmd slurmctld slurm-client munge
	$(BIN)/pytest --noconftest tests/check_clusters.py

models-check: $(VENV)/.installed  ## The example networks of other libraries.
	$(BIN)/pip install --quiet --editable '.[models]'
	JAX_PLATFORMS=cpu $(BIN)/pytest --noconftest tests/check_public_models.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## The site, in build/docs; any warning is an error.
	$(BIN)/python -m sphinx -W --keep-going -n -q -E docs build/docs

notebook: $(VENV)/.docs  ## Runs docs/digits.ipynb and keeps its results in it.
	JAX_PLATFORMS=cpu $(BIN)/jupyter execute --inplace docs/digits.ipynb

wheel: $(VENV)/.installed  ## Builds sdist and wheel, and imports each with only its core dependencies.
	rm -rf dist build/whl-venv build/gz-venv
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	for kind in whl gz; do \
	  $(PYTHON) -m venv build/$$kind-venv && \
	  build/$$kind-venv/bin/pip install --quiet dist/*.$$kind && \
	  (cd build && JAX_PLATFORMS=cpu $$kind-venv/bin/python ../benchmarks/import_time.py) || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
