# Every target sets up .venv first. Only git, make and Python >= 3.11 must be installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Another index for torch's wheel, for example one of CPU-only builds; empty means the default index.
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
PICO := training/pico/*.py tests/core/test_pico_world.py
# Text that people write: no generated code, no data.
SPELLED := '*.md' '*.proto' '*.py' '*.sh' '*.toml' Makefile $(foreach each,_pb2.py _pb2_grpc.py,':!*$(each)') $(foreach each,$(PICO),':!$(each)')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-deploy lint protos bench faults clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/' | expand -t 10

setup: $(STAMP)  ## Make .venv with the dependencies of demo and test.

$(STAMP): pyproject.toml constraints.txt
	@command -v $(firstword $(PYTHON)) >/dev/null || { \
		echo "There is no $(PYTHON) here; Python 3.11 or newer is needed. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@# Debian's Python without python3-venv leaves a .venv without pip; the next run completes it.
	@$(PIP) --version >/dev/null 2>&1 || \
		$(PYTHON) -m venv $$(test -x $(BIN)/python || echo --clear) $(VENV) || { \
		echo "Python's venv module is needed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (once; a few minutes, mostly torch) ..."
	@# Only torch comes from that index: it has other versions of torch's dependencies, or none.
	@$(if $(TORCH_INDEX),$(PIP) install --quiet --constraint constraints.txt --no-deps --index-url $(TORCH_INDEX) torch,true) || { \
		echo "torch could not be installed from $(TORCH_INDEX). Check TORCH_INDEX, and PIP_PROXY behind a proxy." >&2; exit 1; }
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]' || { \
		echo "The installation failed. Behind a proxy set PIP_INDEX_URL; for CPU-only torch see TORCH_INDEX in README.md." >&2; exit 1; }
	@touch $@

demo: setup  ## Start the four services and make four images in out/.
	@$(BIN)/python -m klein_services.cli.demo

# One thread in each process: tiny models gain nothing from more, and threads that wait for each other take processor time.
test: setup  ## Run the whole test suite, in a process for each processor, four at most.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-deploy: setup  ## Check and exercise deploy/ with the programs of deploy/tools.
	@# Without Debian's packages, programs on PATH are used, and tests that miss one are skipped.
	@! command -v apt-get >/dev/null || PYTHON=$(BIN)/python ./deploy/tools/install.sh
	@$(BIN)/python -m pytest tests/deploy

lint: setup  ## Check style, types, imports, spelling, sizes and protos.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@git ls-files $(SPELLED) | xargs $(BIN)/codespell
	@# Short strings of pico's training are its data, in British and American words.
	@$(BIN)/codespell --ignore-regex '(?<!")"[^"]+"(?!")' $(PICO)
	@$(BIN)/python -m tests.contract.house
	@./protos/check.sh
	@# The page is plain JavaScript; its types are in comments. Nothing is built.
	@! command -v npx >/dev/null || npx --yes --package=typescript@7.0.2 tsc -p services/klein_services/gateway/page/jsconfig.json

protos: setup  ## Generate the Python code of protos/.
	@$(BIN)/python protos/generate.py

bench: setup  ## Run five of the benchmarks in docs/benchmarks.md; CONTRIBUTING.md names the others.
	@for script in core transport overhead pico health; do $(BIN)/python -m benchmarks.$$script || exit 1; done

FAULTS ?= 1000
faults: setup  ## Cause FAULTS random faults in real replicas under load, 1000 by default; takes up to 90 minutes.
	@$(BIN)/python -m benchmarks.faults --check --count $(FAULTS)

clean:  ## Remove .venv and build outputs.
	@rm -rf $(VENV) build dist out
