# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test gpu sanitize lint format clean

help: ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(RUN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("fastmask needs Python 3.11 or newer; %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)

ENGINE := setup.py $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

# A stamp for each set of packages: installing again only when pyproject.toml or the engine changes.
$(VENV)/.installed-all: $(RUN)/python pyproject.toml $(ENGINE)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(RUN)/python pyproject.toml $(ENGINE)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	@touch $@ $(VENV)/.installed-all

demo: $(VENV)/.installed-all ## install, run domain transfer on the embedded digits, say where the report is
	$(RUN)/fastmask transfer

test: $(VENV)/.installed-dev ## install, run every test
	$(RUN)/python -m pytest -n 2 --dist worksteal

gpu: ## on a machine with a GPU: build, check and measure everything there, into gpu-results
	$(PYTHON) benchmarks/gpu_suite.py --out gpu-results

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1
ENGINE_TESTS := $(patsubst fastmask/ops/%/cpu.py,tests/ops/test_%.py,$(wildcard fastmask/ops/*/cpu.py))

# Python itself is not built with them: their libraries come first, and what it never frees is no leak.
sanitize: $(VENV)/.installed-dev ## build the CPU engine with ASan and UBSan, run the tests of its ops on it
	rm -rf build/sanitized
	FASTMASK_CUDA_ARCHS=none FASTMASK_CXXFLAGS="$(SANITIZERS)" $(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/sanitized .
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
	$(RUN)/pytest -q -p no:cacheprovider -k "cpu- and not compile and not opcheck" $(ENGINE_TESTS)

lint: $(VENV)/.installed-dev ## ruff check, ruff format --check, mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy fastmask

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean: ## remove what was built, not the virtual environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
