# `make demo` and `make test` create the virtual environment and install what they need; run them as often as you like.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := $(VENV)-newest-transformers
GRAPHS := $(VENV)-graphs
# A graph that hangs is a failure after so many seconds.
GRAPH_TIMEOUT ?= 1500
WITHOUT_TRANSFORMERS := sharder* checkpoint_checks mutated_files one_verdict rank_file_identity parallel planning \
  load_check structure start_up fp8 fp8_accuracy fp8_values fp8_rank_files fp8_experts weight_forms \
  compressed_checkpoints expert_kernel graph_cost progress_bar without_sdk mla sharded_attention shard_choice paged \
  shards mtp_rank_files speculation_gain padded_heads member_commands state_dict results_csv package
GRAPH_TESTS := $(wildcard test/device_graphs/test_*.py)

.PHONY: demo test test-newest-transformers graph-env test-graphs $(GRAPH_TESTS) lint clean

demo: $(VENV)/installed
	$(BIN)/nxdi-deepseek demo

# Two processes: a process has one backend, the unit tests the embedded runtime, the integration tests NxDI.
test: $(VENV)/installed
	$(BIN)/python -m pytest test/unit
	$(BIN)/python -m pytest test/integration

# Without the tests of checkpoints, plans and graphs, which know nothing of transformers, and those that take nothing but
# a tokenizer from it.
test-newest-transformers: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest test/unit $(patsubst %,--ignore-glob='*/test_%.py',$(WITHOUT_TRANSFORMERS))

# What lowers and executes the device's graphs: 6.6 GB, most of it CUDA libraries that torch 2.8's wheel links to. What a
# broken installation left is used by the next one.
graph-env: $(GRAPHS)/installed
	@du -sh $(GRAPHS)

# A process per module, two at a time: one core is all that a module uses.
test-graphs: $(GRAPHS)/installed
	$(MAKE) --jobs=2 --output-sync=target $(GRAPH_TESTS)

$(GRAPH_TESTS):
	timeout --kill-after=10 $(GRAPH_TIMEOUT) $(GRAPHS)/bin/python -m pytest --quiet $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin --target=3.10- --no-tips --violations --quiet src test tools bench

clean:
	rm -rf $(VENV) $(NEWEST) $(GRAPHS)

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,nxdi,lint]'
	touch $@

$(NEWEST)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(GRAPHS)/installed: setup.cfg pyproject.toml tools/graph-env.txt
	$(PYTHON) -m venv $(GRAPHS)
	$(GRAPHS)/bin/python -m pip install --quiet --no-deps --requirement tools/graph-env.txt
	$(GRAPHS)/bin/python -m pip install --quiet filelock fsspec jinja2 networkx sympy typing_extensions \
	  absl-py numba numpy pyyaml requests safetensors 'transformers>=4.57,<4.58' xxhash \
	  boto3 pillow tenacity 'pytest>=8'
	$(GRAPHS)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
