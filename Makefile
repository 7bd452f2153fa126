# make train   set up and run the main job: digits, half a minute, no download
# make test    set up and run all tests
# make test-oldest  the same with the oldest libraries that requirements*.txt allow, in .venv-oldest
# make test-slurm  runs under a real SLURM on this machine, with Debian's packages: tests/slurm.sh
# make torture kill runs 36 times at random moments, resume them, compare how they end
# make sweep   every network of timm up to 30 M parameters trains, resumes, loads, or is refused
# make breaks  break the code on purpose in 98 places; the tests must notice each one
# make bench   speed on this CPU, side by side with what others do: about 8 minutes
# make bench-gpu  speed and memory on a GPU, tests first; ARGS="--cifar FOLDER" adds the demo's recipe
# make lint    style, and the types of what Python calls
# make clean   delete the environments and all of runs/, checkpoints too
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
UV := $(shell command -v uv)
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: train test test-oldest test-slurm torture sweep breaks bench bench-gpu lint clean

# Python keeps what it has compiled, in the environment and in __pycache__: many containers tell it not
# to, and each of the tests' processes would compile torch, Lightning and timm again, for 12 s.
unexport PYTHONDONTWRITEBYTECODE

# $(call install,ENVIRONMENT,PACKAGES) installs with uv, which pip brings where it is not there.
define install
	$(if $(UV),$(UV) venv --quiet --allow-existing --python $(PYTHON) $(1),$(PYTHON) -m venv $(1))
	$(if $(UV),,$(1)/bin/python -m pip install --quiet --disable-pip-version-check uv)
	$(or $(UV),$(1)/bin/uv) pip install --quiet --python $(1)/bin/python $(2)
endef

# The stamp holds only when every step went through, so an interrupted set-up is repeated.
$(VENV)/.train: requirements.txt
	$(call install,$(VENV),-r requirements.txt)
	touch $@

$(VENV)/.test: requirements.txt requirements-dev.txt requirements-extra.txt
	$(call install,$(VENV),-r requirements-dev.txt)
	touch $(VENV)/.train $@

# Old releases have ready-made files for Python 3.11 and 3.12: make test-oldest PYTHON=python3.11
# The environment starts anew, since uv keeps what is there if the bounds allow it.
$(OLDEST)/.test: requirements.txt requirements-dev.txt requirements-extra.txt
	rm -rf $(OLDEST)
	$(call install,$(OLDEST),--resolution lowest-direct -r requirements-dev.txt)
	touch $@

train: $(VENV)/.train
	$(BIN)/python train.py --config configs/quickstart.yaml

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-oldest: $(OLDEST)/.test
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST)

test-slurm: $(VENV)/.train
	tests/slurm.sh

torture: $(VENV)/.test
	$(BIN)/python tests/torture.py --kills 36

sweep: $(VENV)/.test
	$(BIN)/python tests/sweep.py

breaks: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/breaks.py

$(VENV)/.bench: $(VENV)/.test benchmarks/requirements.txt
	$(call install,$(VENV),-r benchmarks/requirements.txt)
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/feed.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/loop.py --case small --block-steps 20
	$(BIN)/python benchmarks/peers.py

bench-gpu: $(VENV)/.test
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(OLDEST) runs .pytest_cache .ruff_cache
