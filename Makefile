# make demo: leanify, train, export and time a small CNN.    make test: run the tests.
# make docs: write the site to build/docs.    make house: how large and how straight the code is.
# make sanitize: the kernel's tests under the address and undefined-behaviour sanitizers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs house sanitize clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/digits.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check lean_fx passes tests examples
	$(BIN)/ruff check lean_fx passes tests examples
	MYPYPATH=examples $(BIN)/mypy lean_fx examples/support

docs: $(VENV)/.installed-test
	$(BIN)/python -m sphinx -q -W --keep-going -c examples/docs examples build/docs
	@echo "open build/docs/index.html"

house: $(VENV)/.installed-test
	$(BIN)/python tests/house.py

sanitize: $(VENV)/.installed-test
	$(BIN)/python tests/sanitize.py

$(VENV)/.installed-%: pyproject.toml constraints.txt $(wildcard lean_fx/kernel/*.cpp lean_fx/kernel/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
