# One command from a fresh clone: `make fig8a`, `make test`. Needs Python 3.11+ and nothing else; `make help` lists the rest.
#
# Everything runs in .venv, made from a lock file on first use and again when that file changes (harness/environment.py).
# Works from any folder: `make -C /path/to/fivefold fig8a`.

PYTHON ?= python3
ARGS ?=
TEST_ARGS ?= -n auto --maxprocesses=8
TORCH_ARGS ?=

SHELL := /bin/sh
ROOT := $(shell cd "$$(dirname "$(strip $(MAKEFILE_LIST))")" && pwd)
IN := cd "$(ROOT)" && PATH="$(ROOT)/.venv/bin:$$PATH" && export PATH &&
SNAKEMAKE := $(IN) exec python -m snakemake

# The Python that makes .venv: the one that PYTHON names, if somebody set it; else the one of .venv where it still runs.
ifeq ($(origin PYTHON),file)
CANDIDATES := .venv/bin/python "$(PYTHON)"
SAME :=
else
CANDIDATES := "$(PYTHON)"
SAME := --this-python
endif
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
define environment
@cd "$(ROOT)" && for python in $(CANDIDATES); do \
	if "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then exec "$$python" -I harness/environment.py $(1) $(SAME); fi; done; \
	echo 'Makefile: PYTHON: $(PYTHON): needs Python 3.11 or newer: name one, for example make PYTHON=python3.12 ...' >&2; exit 2
endef

.PHONY: help environment test-environment fig8a spotserve_table1 all claims doctor test lint format lock torch clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' "$(ROOT)/Makefile"
	@echo '  ARGS="..." goes to snakemake (ARGS="--config scale=smoke"), TEST_ARGS="..." to pytest; PYTHON=python3.12 chooses a Python.'

environment:
	$(call environment,runtime)

test-environment:
	$(call environment,test)

fig8a spotserve_table1 all claims: environment
	@$(SNAKEMAKE) $@ $(ARGS)

fig8a: ## Figure 8a of LLMStation: PDF, table and verdicts under results/
spotserve_table1: ## Table 1 of SpotServe
all: ## every figure
claims: ## every claim of the papers beside what we got

doctor: environment ## what this machine has and lacks
	@$(IN) exec python -m harness.doctor $(ARGS)

test: test-environment ## all tests (TEST_ARGS="-m 'not slow'" for the fast ones)
	@$(IN) exec python -m pytest $(TEST_ARGS)

CHECKS := "ruff check ." "ruff format --check ." "mypy --strict" "snakefmt --check Snakefile workflows" "python -m snakemake --lint"
lint: test-environment ## style, types and the workflow's own checks
	@$(IN) failed=; for check in $(CHECKS); do echo "== $$check"; $$check || failed="$$failed, $$check"; done; \
	if [ -n "$$failed" ]; then echo "failed: $${failed#, }" >&2; exit 1; fi

format: test-environment ## mends style where a program can
	@$(IN) ruff check --fix . ; ruff format . && snakefmt Snakefile workflows

torch: environment ## PyTorch, for the measured backend (TORCH_ARGS="--index-url ..." for another build)
	@$(IN) exec python -m pip install --disable-pip-version-check $(TORCH_ARGS) torch==2.13.0 \
		transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0 uvicorn==0.54.0

LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" pyproject.toml
lock: ## writes both lock files anew from pyproject.toml (needs uv on the PATH); ARGS=--upgrade for newer versions
	@cd "$(ROOT)" && $(LOCK) -o requirements.lock $(ARGS) && $(LOCK) --extra test -c requirements.lock -o requirements-test.lock $(ARGS)

clean: ## removes the environment and caches; results stay
	@cd "$(ROOT)" && rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	@cd "$(ROOT)" && find . -name __pycache__ -type d -prune -exec rm -rf {} +
