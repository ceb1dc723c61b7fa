# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= store
CONFIG ?= configs/sandbox.yaml

# Everything that Prefect keeps lies in the store; nothing is sent anywhere.
export PREFECT_HOME ?= $(abspath $(STORE))/prefect
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS ?= 180
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export PREFECT_LOGGING_EXTRA_LOGGERS ?= diffagent
export PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW ?= ignore
export DO_NOT_TRACK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1
# Tiny models on busy cores: a second OpenMP thread costs more than it brings.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test lint bench serve-dashboard sandbox clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-rewards.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray,s3]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-rewards.txt
	$(BIN)/python -m diffagent.compat
	touch $@

demo: install
	mkdir -p "$(PREFECT_HOME)"
	$(BIN)/python -m flows.run_pipeline $(CONFIG) --store $(STORE)

test: install
	mkdir -p "$(PREFECT_HOME)"
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# Prefect's own UI on port 4200; the store with the reports on port 4201.
serve-dashboard: install
	mkdir -p "$(PREFECT_HOME)"
	$(BIN)/python -m http.server 4201 --bind 127.0.0.1 --directory $(STORE) >/dev/null 2>&1 & \
	trap "kill $$!" EXIT INT TERM; $(BIN)/prefect server start

# Hours of CPU. The weights are committed; diffagent/sandbox/README.md has their logs and numbers.
sandbox: install
	rm -f diffagent/sandbox/weights/specialist-*.safetensors diffagent/sandbox/weights/lora-*.safetensors
	for step in vae unet export specialists; do \
		$(BIN)/python -m diffagent.sandbox.train_generator $$step || exit 1; done
	$(BIN)/python -m diffagent.sandbox.attributes train
	$(BIN)/python -m diffagent.sandbox.evaluate_generator
	for step in clip image-reward hps reference evaluate; do \
		$(BIN)/python -m diffagent.sandbox.train_scorers $$step || exit 1; done

clean:
	rm -rf $(STORE) build dist *.egg-info
