# `make test` sets up everything that it needs and runs every check.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
USABLE := $(VENV)/.deqcore-usable
STAMP  := $(VENV)/.deqcore-installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# pip compiles one file after the other; this uses all cores, and leaves out what nothing here imports. Some packages
# ship files for other versions of Python, so the exit status says nothing.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|transformers/models)/' $(VENV)/lib || true

.PHONY: study test check types unit coverage bench field plugins faults fuzz docs release-check clean

# Install the pinned torch first, so that no later package replaces it by another build.
$(VENV)/.torch: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
	touch $@

$(USABLE): $(VENV)/.torch
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[all]"
	$(COMPILE)
	touch $@

# With the packages that only the checks need.
$(STAMP): $(VENV)/.torch
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[all,test]"
	$(COMPILE)
	touch $(USABLE) $@

# Handwritten digits, one equilibrium model, three backward strategies; report in study-digits/report.html.
study: $(USABLE)
	$(BIN)/deqcore study $(ARGS)

# What comes before the tests keeps one core busy each.
test: $(STAMP)
	$(MAKE) -j2 check plugins
	$(MAKE) types unit

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/tools/prose.py

# Check the types of deqcore in users' programs with mypy and pyright.
USERS := tests/types/user.py examples/one_program/fit.py examples/custom_solver/run.py examples/custom_solver/aitken.py
types: $(STAMP)
	$(BIN)/mypy --strict $(USERS)
	PYTHONPATH=.:backends $(BIN)/pyright --pythonpath $(BIN)/python $(USERS) $(wildcard examples/plugins/deq_[mrs]*/deq_*)

unit: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The tests again, watched line by line, and with JAX's programs compiled as users compile them (tests/conftest.py).
coverage: $(STAMP)
	XLA_FLAGS= COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if hasattr(sys, "monitoring") else "ctrace")') \
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=90

# The tables under docs/benchmarks: 23 minutes on 2 quiet cores, torch 15, JAX 8.
bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks --out docs/benchmarks

# Judge solvers of other libraries: docs/field, and a card for each in build/field. ARGS="--only scipy-hybr": one of them.
field: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -r examples/adapters/requirements.txt
	$(BIN)/python -m benchmarks.field $(ARGS)

# Install the wheels of deqcore and examples/plugins in a fresh environment, and run their suites.
plugins: $(STAMP)
	$(BIN)/python examples/plugins/check.py

# The planted faults against the whole suite, and random mutants (`make test` runs each fault's own check).
faults: $(STAMP)
	$(BIN)/python tests/faults/run.py --matrix --mutants 100 --json docs/conformance/faults.json --resume

# Configs, plugins and logs of all kinds, CASES of each of nine kinds: nothing but errors of deqcore may come of them.
CASES ?= 1500
fuzz: $(STAMP)
	FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -q tests/core/test_fuzz.py

# The site, into build/site; its code blocks are run by `make unit`. It links to the repository if git has its web address.
docs: export REPO_URL ?= $(filter https://%,$(shell git remote get-url origin 2>/dev/null))
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Build the distribution twice and test it in fresh environments (minutes). ARGS="core-3.12": one of them only.
release-check: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[release]"
	$(BIN)/python release/check.py $(ARGS)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
