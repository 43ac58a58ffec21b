PYTHON ?= python3
MARK ?= not slow

INSTALL = -m pip install --quiet --disable-pip-version-check
PYTEST = -m pytest -n 2 --dist worksteal -m "$(MARK)"

# One thread for each of the two workers.
test test-slow lowest: export OMP_NUM_THREADS = 1
test-slow: MARK = slow

.PHONY: demo test test-slow lowest lint format docs bench results results-full

demo: .venv/installed
	.venv/bin/saccade demo

test test-slow: .venv-test/installed
	.venv-test/bin/python $(PYTEST)

lowest: .venv-lowest/installed
	.venv-lowest/bin/python $(PYTEST)

lint: .venv-test/installed
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy

format: .venv-test/installed
	.venv-test/bin/ruff format .
	.venv-test/bin/ruff check --fix .

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv-test/installed
	.venv-test/bin/mkdocs build --strict

bench: .venv-test/installed
	.venv-test/bin/python -m benchmarks.overhead
	.venv-test/bin/python -m benchmarks.seams
	.venv-test/bin/python -m benchmarks.harness

# It says how long it takes, and goes on where it was cut off.
results: .venv-test/installed
	.venv-test/bin/python -m saccade.bench.published

results-full: .venv-test/installed
	.venv-test/bin/python -m saccade.bench.published --full

# A release of torch that has a small CPU wheel; the newest will do where there is none.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	-.venv/bin/python $(INSTALL) torch==2.13.0
	.venv/bin/python $(INSTALL) -e .
	touch $@

.venv-test/installed: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(INSTALL) -e '.[all,dev]'
	touch $@

# The oldest of all that is needed at run time, as pyproject.toml has it.
.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	sed -n '/^dependencies/,/^all/p' $< | grep -oE '[a-z0-9]+>=[0-9.]+' | sed 's/>=/==/' > .venv-lowest/oldest
	.venv-lowest/bin/python $(INSTALL) -e '.[all,dev]' -c .venv-lowest/oldest
	touch $@
