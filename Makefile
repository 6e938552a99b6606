# make demo       everything end to end on pictures drawn by code; a fresh machine needs only python3 (3.10+) and make
# make check      lint, format and types
# make test       the tests but those marked slow, a few minutes on 2 cores
# make test-all   all tests
# make bench      the quick benchmarks: preprocessing, and a training step of a small network
# make browser    Chromium for the tests of app.py, where this is root on Debian or Ubuntu; without one they skip by name
# make docs       write docs/config.md and docs/config_zh.md from isonext/config.py
# make clean      remove the virtual environment and the demo's outputs

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# A file's tests stay in one worker, which makes its fixtures once; tests/conftest.py says which file comes first.
PYTEST := $(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

demo: $(VENV)/.installed
	$(RUN) demo.py

check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(FLAGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) $(FLAGS)

bench: $(VENV)/.installed
	$(RUN) benchmarks/preprocess.py
	$(RUN) benchmarks/train_step.py --hidden_dim 64 --num_layers 2 --batch_size 8

docs: $(VENV)/.installed
	$(RUN) -m isonext.config

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

browser:
	command -v chromium || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

$(VENV)/.installed-dev: requirements.txt pyproject.toml requirements/app.txt requirements/dev.txt requirements/eval.txt requirements/export.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements/dev.txt
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) outputs/demo

.PHONY: demo check test test-all bench docs browser clean
