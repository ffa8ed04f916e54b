# `make demo` and `make test` each set up what they need on a fresh machine; a second run is quick.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: demo test test-all lint clean

demo: $(VENV)/.ready
	$(RUN) tests/demo.py

PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what takes under 5 s a test; `make test-all` is everything
test: $(VENV)/.ready lint
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-all: $(VENV)/.ready lint
	$(PYTEST) $(PYTEST_FLAGS)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) tests/house.py
	$(RUN) -m mypy

$(VENV)/.ready: requirements-lock.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-lock.txt
	touch $@

clean:
	rm -rf $(VENV) .cache
