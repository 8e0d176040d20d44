# All the set-up is done here: each command makes .venv, installs into it what it needs
# and runs. Only Python 3.11 or newer (with pip and venv) and make have to be there.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n 2 --dist worksteal --durations=10 --durations-min=5

# Most of the tests' time is compilation of small programs that run once. These ask XLA
# for code that is made three times faster and runs slower. `make test-all` leaves them out,
# so that every test is held under the compiler's own choices too.
XLA_QUICK := --xla_backend_optimization_level=0 \
  --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint format types docs wheel bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The stamps are touched last, so an interrupted step is done again; a change of
# pyproject.toml installs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "optax_cl needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] \
	  + ". Name another one: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-experiments ## Run the main study, the quick form
	$(PY) -m experiments run domain_stream --quick

test: $(VENV)/.installed-test ## Run every test that isn't slow
	XLA_FLAGS="$(XLA_QUICK) $$XLA_FLAGS" $(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test ## Run every test
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## Check format and lint
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: $(VENV)/.installed-dev ## Format, and mend what the linter can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.installed-dev ## Check the types
	$(PY) -m pyrefly check --python-interpreter-path $(PY)

docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build/html
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

wheel: $(VENV)/.installed-dev ## Build the wheel and import it in a clean environment
	rm -f dist/optax_cl-*
	$(PY) -m build --outdir dist
	PYTHON=$(PYTHON) bash .ci/check_wheel dist/optax_cl-*.whl

bench: $(VENV)/.installed-bench ## Measure speed and memory, as ratios
	$(PY) -m benchmarks

clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) docs/_build docs/api/rooms .pytest_cache .ruff_cache .hypothesis
	rm -f dist/optax_cl-*
