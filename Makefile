# make demo, make test: each sets up .venv with what it needs, once, and reuses it afterwards.
# make gpu-report PYTHON=python: takes that interpreter as it is, and installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint format gpu-report clean

demo: $(VENV)/installed
	$(BIN)/python train.py --arch A --data digits --out runs/demo --resume never

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck sweeps/*.sh sweeps/*.sbatch recipes/*.sh .ci/run

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ifeq ($(origin PYTHON),file)
gpu-report: $(VENV)/installed-dev
	$(BIN)/python profile/gpu_report.py $(if $(DATA),--data $(DATA))
else
gpu-report:
	$(PYTHON) profile/gpu_report.py $(if $(DATA),--data $(DATA))
endif

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
