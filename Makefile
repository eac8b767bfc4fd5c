# Two commands do everything on a fresh machine with Python >= 3.11, pip and g++:
#   make demo    quantizes a real language model by mixed precision and shows what it costs
#   make test    lints, then runs the whole test suite with coverage
# Both make .venv first if it is missing or older than what it is built from; a second run reuses it.

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
# The plain torch wheel for Linux is a CUDA build of several GB; this index holds the CPU build. Empty: use pip's own indexes only.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_ARGS   ?=
BENCH_ARGS  ?=
PYTEST_ARGS ?=
# Processes that share the test files, one thread each: a core and up to 4 GB of memory for each of them. 0: none beside pytest itself, for a debugger.
PYTEST_WORKERS ?= 2

# The GPUs of this machine, or a single capability without one: all that a wheel is for takes seven times as long.
export MXQ_CUDA_ARCHS ?= native

READY  := $(VENV)/.ready
INPUTS := pyproject.toml setup.py .ci/venv.py $(wildcard third_party/*.txt) $(shell find csrc -type f)

.PHONY: demo test lint bench venv clean distclean

demo: $(READY)
	$(VENV)/bin/mxq demo $(DEMO_ARGS)

test: VENV_ARGS = --cuda-compiler --extras nsga,tasks
# The linter's verdict counts, but pytest runs in any case and has the last word.
test: $(READY)
	@$(VENV)/bin/ruff check .; lint=$$?; \
	$(VENV)/bin/python -m pytest --cov --cov-report=term --durations=20 --durations-min=10 -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS); tests=$$?; \
	exit $$((lint > tests ? lint : tests))

lint: $(READY)
	$(VENV)/bin/ruff check .

bench: $(READY)
	$(VENV)/bin/mxq bench $(BENCH_ARGS)

venv: $(READY)

# A run that was cut short leaves no stamp, so the next one resumes it.
$(READY): $(INPUTS)
	$(PYTHON) .ci/venv.py $(VENV) --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)" $(VENV_ARGS)
	@touch $@

clean:
	rm -rf build dist *.egg-info mxq_ext/*.so .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* $(READY)
	find mxq_ext python_tests bench -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) mxq-demo
