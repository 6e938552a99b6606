# make demo   everything end to end on pictures drawn by code; a fresh machine needs only python3 (3.10+) and make
# make test   lint and the test suite
# make clean  remove the virtual environment and the demo's outputs

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

demo: $(VENV)/.installed
	$(RUN) demo.py

test: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements/dev.txt
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) outputs/demo

.PHONY: demo test clean
