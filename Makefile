# make demo, make test, make docs: each sets up .venv with what it needs, once, and reuses it afterwards.
# make gpu-report PYTHON=python: takes that interpreter as it is, and installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

QUICK := tests/common tests/model tests/pipeline tests/engine tests/perf

.PHONY: demo quick test test-slow lint format docs pictures gpu-report clean

demo: $(VENV)/installed
	$(BIN)/python train.py --arch A --data digits --out runs/demo --resume never

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

# While you change something: what needs neither another process nor many seconds. One thread for each of its processes.
quick: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not processes and not seconds" -n auto --maxprocesses 4 --dist loadfile $(QUICK)

# What measures times, or takes all cores for long, runs alone (its mark says so); the rest two at a time, even if a test of the
# first part has failed. SLURM's tests come first, since they mostly wait. Blocks of one page of the documentation go on from one
# another. One thread for each of its processes: two cores have no more to give.
TESTS = $(wildcard tests/test_*.py tests/*/test_*.py)
FIRST = tests/runs/test_slurm.py $(filter tests/repository/%,$(TESTS))

test-slow: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -m "slow and alone"; alone=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadgroup --no-loadscope-reorder \
		$(FIRST) $(filter-out $(FIRST),$(TESTS)) && exit $$alone

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck sweeps/*.sh sweeps/*.sbatch recipes/*.sh .ci/run

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs
	$(BIN)/python docs/site_pages.py .site-pages
	$(BIN)/zensical build --strict --clean

# Those of README and docs/, drawn by the programs that they show: minutes on a machine with nothing else to do.
pictures: $(VENV)/installed
	rm -rf runs/pictures
	$(BIN)/python train.py --arch A --data digits --out runs/pictures/demo
	$(BIN)/python profile/throughput.py --out runs/pictures/throughput
	$(BIN)/python train.py --arch A --data digits --inspect 12 --out runs/pictures/look
	mkdir -p docs/pictures
	cp runs/pictures/demo/curves.png runs/pictures/throughput/waterfall.png runs/pictures/look/inspect.png docs/pictures

ifeq ($(origin PYTHON),file)
gpu-report: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.gpu_report $${DATA:+--data "$$DATA"}
else
gpu-report:
	$(PYTHON) -m benchmarks.gpu_report $${DATA:+--data "$$DATA"}
endif

clean:
	rm -rf $(VENV) site .site-pages .pytest_cache .mypy_cache .ruff_cache

# pip comes last: a .venv that was interrupted on its way is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/installed-docs: requirements-docs.txt | $(BIN)/pip
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@
