# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= store
API_PORT ?= 4200
STORE_PORT ?= 4201
CONFIG ?= configs/sandbox.yaml

# Prefect's files are in the store; its other settings are in prefect.toml.
# ($(abspath) would split the name of a store with a space.)
export PREFECT_HOME ?= $(shell $(PYTHON) -c 'import os, sys; print(os.path.abspath(sys.argv[1]))' "$(STORE)")/prefect
export DO_NOT_TRACK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1
# With tiny models on busy cores a second OpenMP thread only costs time.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test lint docs bench serve-dashboard sandbox clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-rewards.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,ray,s3]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-rewards.txt
	$(BIN)/python -m diffagent.compat
	$(BIN)/python -m diffagent.sandbox build/sandbox
	touch $@

demo: install
	mkdir -p "$(PREFECT_HOME)"
	$(BIN)/python -m diffagent.sandbox build/sandbox
	$(BIN)/python -m flows.run_pipeline $(CONFIG) --store "$(STORE)"

test: install
	mkdir -p "$(PREFECT_HOME)"
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site in build/docs; a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/docs

bench: install
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# Prefect's UI and API, and the reports and data of the store; for browsers on this machine only.
serve-dashboard: install
	$(BIN)/python -m flows.serve_dashboard --store "$(STORE)" --port $(API_PORT) --store-port $(STORE_PORT)

# Trains the committed weights anew: hours of CPU. See diffagent/sandbox/README.md.
sandbox: install
	rm -f diffagent/sandbox/weights/specialist-*.safetensors diffagent/sandbox/weights/lora-*.safetensors
	for step in vae unet export specialists; do \
		$(BIN)/python -m tools.sandbox.train_generator $$step || exit 1; done
	$(BIN)/python -m tools.sandbox.attributes train
	$(BIN)/python -m tools.sandbox.evaluate_generator
	for step in clip image-reward hps reference evaluate; do \
		$(BIN)/python -m tools.sandbox.train_scorers $$step || exit 1; done

clean:
	rm -rf "$(STORE)" build dist *.egg-info
