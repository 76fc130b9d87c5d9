# Linux and macOS; on Windows run `python tools/setup_env.py` and then the commands below by hand.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
DETECTRON2 ?=
# More arguments for tools/demo.py and pytest.
DEMO_ARGS ?=
PYTEST_ARGS ?=

RUN = "$(VENV)/bin/python"
# A process for each core, each with one thread: what is tested is too small for more. At most four,
# for each holds a gigabyte or two.
TESTS = OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses=4 --dist=worksteal
# A Python named by the user must be the one that runs; the default one need not be.
MATCH = $(if $(filter file,$(origin PYTHON)),,--match-python)

.PHONY: help setup demo test test-all lint format clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      set up .venv if it is missing; evaluate a trained DETR, train one from nothing, draw pictures'
	@echo 'make test      the same set-up, then the tests (about 10 minutes on 2 cores)'
	@echo 'make test-all  the slow tests too'
	@echo 'make setup     the set-up alone'
	@echo 'make lint      check style; make format puts it right'
	@echo 'make clean     remove caches and build files; data sets, results and .venv stay'
	@echo
	@echo 'PYTHON=python3.12             Python to create the environment with (3.10 to 3.13)'
	@echo 'VENV=folder                   another environment, as the active one: VENV="$$VIRTUAL_ENV"'
	@echo 'TORCH="torch==... torchvision==..."   another PyTorch; any arguments of pip install'
	@echo 'DETECTRON2=git+https://...    another detectron2; any arguments of pip install'
	@echo 'PYTEST_ARGS="-k matcher"      more arguments for pytest; DEMO_ARGS for tools/demo.py'

setup:
	@"$(PYTHON)" -c 'f""' 2>/dev/null || \
	  { echo 'set-up: "$(PYTHON)" is no Python 3 here. Name one: make demo PYTHON=python3.12' >&2; exit 1; }
	@"$(PYTHON)" tools/setup_env.py --venv "$(VENV)" --torch="$(TORCH)" --detectron2="$(DETECTRON2)" $(MATCH)

demo: setup
	@$(RUN) tools/demo.py $(DEMO_ARGS)

test: setup
	$(TESTS) -m "not slow" --durations=10 $(PYTEST_ARGS)

test-all: setup
	$(TESTS) --durations=20 $(PYTEST_ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find detr_d2 configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
