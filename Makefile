# `make demo` and `make test` do all the set-up themselves. PYTHON and VENV may be given:
#   make test PYTHON=python3.12 VENV=/tmp/tilewright-venv

PYTHON ?= python3
VENV ?= .venv

INSTALLED := $(VENV)/tilewright-installed
# what a build is made from: a change here installs again, which compiles only what changed
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt \
  $(wildcard csrc/*/* bindings/* kernels/*/__init__.py)

.PHONY: demo test bench doctor check clean

demo: $(INSTALLED)
	$(VENV)/bin/tilewright demo

test: $(INSTALLED)
	$(VENV)/bin/pytest

bench: $(INSTALLED)
	$(VENV)/bin/tilewright bench attention

doctor: $(INSTALLED)
	$(VENV)/bin/tilewright doctor

# tests in a fresh environment, lint, types
check:
	.ci/run

$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "tilewright needs Python 3.10 or newer; $(PYTHON) is not. Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info engine/*.so
