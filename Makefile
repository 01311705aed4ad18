# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-engines test-deploy test-images check lock format protos catalogue bench proof

$(BIN)/arbitrage: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/arbitrage ## solve bundled problems with the shipped models and print what it cost
	$(BIN)/arbitrage demo

test: $(VENV)/.dev ## every test but those of real engines and of the chart
	$(BIN)/pytest

test-engines: $(VENV)/.dev ## real vLLM and llama.cpp servers; the first time installs them, 10 minutes
	$(BIN)/python -m tests.engines.install
	$(BIN)/pytest -m engines tests/engines

$(VENV)/.deploy: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,deploy]'
	touch $@

test-deploy: $(VENV)/.deploy ## chart and compose file, by a real Helm and others that it fetches
	$(BIN)/python -m tests.charts.tools
	$(BIN)/pytest -m deploy tests/charts tests/images

test-images: $(VENV)/.deploy ## builds every image and starts it; needs root, buildah and debootstrap
	$(BIN)/python -m tests.images.build
	$(BIN)/pytest -m images tests/images

check: $(VENV)/.dev ## what CI runs before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	$(BIN)/python protos/generate.py --check
	$(BIN)/python -m tools.audit
	$(BIN)/pytest -m 'not slow and not engines and not deploy and not images'

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd protos && ../$(BIN)/buf format --write

protos: $(VENV)/.dev ## regenerate arbitrage/v1 from protos/
	$(BIN)/python protos/generate.py

lock: $(VENV)/.deploy ## rewrite locks/, what the images install
	$(BIN)/python -m tools.lock

catalogue: $(VENV)/.dev ## rewrite docs/metrics.md, docs/settings.md and the chart's names of settings from the code
	$(BIN)/python -m docs.catalogue

proof: $(VENV)/.dev ## does advantage beat absolute quality? about half an hour on two cores
	$(BIN)/python -m benchmarks.frontier --json benchmarks/results/frontier.json --plot benchmarks/results/frontier.png
	$(BIN)/python -m benchmarks.ablation --json benchmarks/results/ablation.json
	$(BIN)/python -m benchmarks.report

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.tiny --json benchmarks/results/tiny.json
	$(BIN)/python -m benchmarks.decoding --json benchmarks/results/decoding.json
	$(BIN)/python -m benchmarks.report
