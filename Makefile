# `make demo` and `make test` create the virtual environment and install what they need; run them as often as you like.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := $(VENV)-newest-transformers

.PHONY: demo test test-newest-transformers lint clean

demo: $(VENV)/installed
	$(BIN)/nxdi-deepseek demo

# Two processes: a process has one backend, the unit tests the embedded runtime, the integration tests NxDI.
test: $(VENV)/installed
	$(BIN)/python -m pytest test/unit
	$(BIN)/python -m pytest test/integration

test-newest-transformers: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest test/unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin --target=3.10- --no-tips --violations --quiet src test tools bench

clean:
	rm -rf $(VENV) $(NEWEST)

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,nxdi,lint]'
	touch $@

$(NEWEST)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@
