# The two commands of the README, and what a contributor types often.
VENV ?= .venv

$(VENV)/bin/pip:
	python3 -m venv $(VENV)

run: $(VENV)/bin/pip
	$(VENV)/bin/pip install -q . && $(VENV)/bin/jaxsim run

test: $(VENV)/bin/pip
	$(VENV)/bin/pip install -q -e '.[test]' && $(VENV)/bin/python -m pytest -n 2

lint:
	$(VENV)/bin/ruff check .

bench:
	$(VENV)/bin/jaxsim bench

.PHONY: run test lint bench
