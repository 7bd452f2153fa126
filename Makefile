# make train   set up and run the main job: digits, about a minute, no download
# make test    set up and run all tests
# make torture kill runs 36 times at random moments, resume them, compare how they end
# make bench   speed on this CPU, side by side with what others do: about 8 minutes
# make bench-gpu  speed and memory on a GPU, tests first; ARGS="--cifar FOLDER" adds the demo's recipe
# make lint    style
# make clean   remove the environment and what runs left
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test torture bench bench-gpu lint clean

# The stamp holds only when every step went through, so an interrupted set-up is repeated.
$(VENV)/.train: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: requirements.txt requirements-dev.txt requirements-extra.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(VENV)/.train $@

train: $(VENV)/.train
	$(BIN)/python train.py --config configs/quickstart.yaml

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

torture: $(VENV)/.test
	$(BIN)/python tests/torture.py --kills 36

$(VENV)/.bench: $(VENV)/.test benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
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

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
