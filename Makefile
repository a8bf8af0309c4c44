# Makefile - build, demo, tests. Each command makes what it needs, the virtual environment too.
#
#   make demo       install into $(VENV) and run examples/word_count.py
#   make test       C tests, linter, type checkers, Python tests
#   make sanitize   C tests under ASan+UBSan and under TSan, a Python run under ASan+UBSan
#   make spec       check the models of the protocol, and that each of their mutants fails (needs spin)
#   make storm      kill a queue's workers 10,000 times, then again with leases, and fail where the others stand still
#                   for over 1 s; takes about 15 minutes. STORM_ARGS='--seed 1' adds arguments
#   make fuzz       overwrite a queue's memory 1,000,000 times while it is used, under ASan+UBSan (FUZZ_ARGS)
#   make bench      measure this and other queues, write docs/performance.md; about 15 minutes (BENCH_ARGS)
#   make clean      remove what the above made
#
# PYTHON and VENV choose another interpreter and place: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON  ?= python3
VENV    ?= .venv
BUILD   ?= build
# Seconds for one C test.
TIMEOUT ?= 300
ifeq ($(origin CC),default)
CC      := gcc
endif

CORE     := $(wildcard core/*.c)
BINDING  := $(wildcard src/shmqueue/_core/*.c)
HEADERS  := $(wildcard core/*.h core/tests/*.h src/shmqueue/_core/*.h)
PACKAGE  := $(wildcard src/shmqueue/*.py src/shmqueue/*.pyi src/shmqueue/py.typed)
SOURCES  := $(CORE) $(BINDING) $(HEADERS) $(PACKAGE) pyproject.toml setup.py requirements.txt
C_TESTS  := $(patsubst core/tests/%.c,%,$(wildcard core/tests/test_*.c))

COMPILE   = $(CC) -std=c11 -g -Wall -Wextra $(WERROR) -Icore -pthread
ASAN     := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

export ASAN_OPTIONS  ?= abort_on_error=1
export UBSAN_OPTIONS ?= print_stacktrace=1
# A child that a threaded test forks has none of its threads, which is no leak.
export TSAN_OPTIONS  ?= halt_on_error=1:report_thread_leaks=0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SAY := @printf '==> %s\n'

.PHONY: install demo test ctest lint types pytest sanitize sanitize-c sanitize-python spec storm fuzz bench clean system
.DELETE_ON_ERROR:
.SECONDARY:

install: $(VENV)/.installed

# --- what the system must have -----------------------------------------------------------------

define FIND_MISSING
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 10):
    print("python3 (3.10 or later; this is %d.%d)" % sys.version_info[:2])
if not importlib.util.find_spec("ensurepip"):
    print("python3-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3-dev")
endef
export FIND_MISSING

system:
	@missing="$$(command -v $(CC) >/dev/null || echo gcc; \
	  if command -v $(PYTHON) >/dev/null; then $(PYTHON) -c "$$FIND_MISSING"; else echo python3; fi)"; \
	test -z "$$missing" || { echo "Missing Debian packages (apt-get install ...):" $$missing >&2; exit 1; }

# --- the virtual environment and, in it, the package -------------------------------------------

$(VENV)/.made: | system
	$(SAY) 'making the virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	$(SAY) 'building shmqueue and installing it into $(VENV)'
	@rm -rf build/lib.* build/bdist.* # setuptools would keep files that are no longer in src/
	@$(VENV)/bin/python -m pip install --quiet .
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.made $(SOURCES)
	$(SAY) 'building shmqueue and installing it, with the test tools, into $(VENV)'
	@rm -rf build/lib.* build/bdist.*
	@$(VENV)/bin/python -m pip install --quiet '.[test]'
	@touch $(VENV)/.installed $@

# --- the two commands of the README ------------------------------------------------------------

demo: $(VENV)/.installed
	$(SAY) 'counting the words of the standard library through a queue'
	@$(VENV)/bin/python examples/word_count.py $(DEMO_ARGS)

test: ctest lint types pytest

lint: $(VENV)/.installed-tests
	$(SAY) 'lint: ruff'
	@$(VENV)/bin/ruff check --quiet .

# The package's sources, then a user's program that sees no more than the installed package.
types: $(VENV)/.installed-tests
	$(SAY) 'types: mypy --strict, pyright'
	@$(VENV)/bin/mypy --no-error-summary
	@$(VENV)/bin/mypy --no-error-summary --strict --config-file= tests/typed_user.py
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

pytest: $(VENV)/.installed-tests
	$(SAY) 'Python tests'
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# --- the models of the protocol ------------------------------------------------------------------

spec:
	$(SAY) 'models: spin'
	@spec/run

# --- the long storm; a short one is among the Python tests -----------------------------------------

STORM := $(VENV)/bin/shmqueue storm --kills 10000 --timeout 1 $(STORM_ARGS)

storm: $(VENV)/.installed
	$(SAY) 'killing workers 10,000 times'
	@$(STORM)
	$(SAY) 'again, with leases'
	@$(STORM) --lease

# --- how fast it is --------------------------------------------------------------------------------

bench: $(VENV)/.installed
	$(SAY) 'installing the other queues into $(VENV)'
	@$(VENV)/bin/python -m pip install --quiet '.[bench]'
	$(SAY) 'measuring'
	@$(VENV)/bin/python benchmarks/report.py $(BENCH_ARGS)

# --- C tests: each core/tests/test_*.c is a program, linked with the whole core ----------------

# C_VARIANT(directory, flags, how to run): objects, programs and runs under $(BUILD)/directory.
define C_VARIANT
$(BUILD)/$(1)/%.o: core/%.c $(HEADERS)
	@mkdir -p $$(@D)
	@$$(COMPILE) $(2) -DSHMQ_TEST -c $$< -o $$@

$(BUILD)/$(1)/test_%: core/tests/test_%.c $(CORE:core/%.c=$(BUILD)/$(1)/%.o) $(HEADERS)
	@$$(COMPILE) $(2) -DSHMQ_TEST $$(filter %.c %.o,$$^) -o $$@

.PHONY: $(C_TESTS:%=run-$(1)-%)
$(C_TESTS:%=run-$(1)-%): run-$(1)-%: $(BUILD)/$(1)/% | system
	$$(SAY) '$(1): $$*'
	@timeout $(TIMEOUT) $(3) $$<
endef

# TSan of older compilers can't stand much randomization of addresses; where a sandbox forbids to
# switch it off, it is tried as it is. GCC warns that its TSan knows no fences: what they order are
# atomics here, which it doesn't report anyway.
FIXED_ADDRESSES := $$$$(setarch -R true 2>/dev/null && echo setarch -R)

$(eval $(call C_VARIANT,ctest,-O2))
$(eval $(call C_VARIANT,asan,$(ASAN)))
$(eval $(call C_VARIANT,tsan,-O1 -fsanitize=thread -Wno-tsan,$(FIXED_ADDRESSES)))

ctest: $(or $(C_TESTS:%=run-ctest-%),$(error no C tests in core/tests))

sanitize-c: $(C_TESTS:%=run-asan-%) $(C_TESTS:%=run-tsan-%)

# --- Python under sanitizers: the package with an extension of its own, not installed ----------

SANITIZED := $(BUILD)/asan/python$(notdir $(VENV))
SANITIZED_PYTHON = LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) PYTHONMALLOC=malloc \
  PYTHONPATH=$(abspath $(SANITIZED)) ASAN_OPTIONS=$(ASAN_OPTIONS):detect_leaks=0$(1) $(VENV)/bin/python

sanitize: sanitize-c sanitize-python

sanitize-python: $(SANITIZED)/shmqueue/_core.so
	$(SAY) 'ASan+UBSan: Python smoke run'
	@timeout $(TIMEOUT) env $(SANITIZED_PYTHON) tests/smoke.py

FUZZ_ARGS := --overwrites 1000000 --seconds 1800
fuzz: $(SANITIZED)/shmqueue/_core.so
	$(SAY) 'ASan+UBSan: overwriting memory in use'
	@env $(call SANITIZED_PYTHON,:quarantine_size_mb=8:max_allocation_size_mb=256) tests/fuzz.py $(FUZZ_ARGS)

$(SANITIZED)/shmqueue/_core.so: $(VENV)/.installed
	@mkdir -p $(@D)
	@cp $(PACKAGE) $(@D)
	@$(COMPILE) $(ASAN) -fPIC -shared $(CORE) $(BINDING) -o $@ \
	  -I"$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"

clean:
	$(SAY) 'removing build outputs, caches and virtual environments'
	@rm -rf $(BUILD) dist .venv .venv-* src/*.egg-info
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -prune -exec rm -rf {} +
