# `make test` sets up everything that it needs and runs every check.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.deqcore-installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: study test check unit bench clean

# torch goes first, with its pin, so that nothing that follows can pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[all,test]"
	touch $@

# Handwritten digits, one equilibrium model, three backward strategies; report in study-digits/report.html.
study: $(STAMP)
	$(BIN)/deqcore study $(ARGS)

test: check unit

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=70

# The tables under docs/benchmarks: about 12 minutes on 2 quiet cores.
bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks --out docs/benchmarks

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
