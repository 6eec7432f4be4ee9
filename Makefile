# Every target sets up what it needs from nothing; all that is written lies in .venv/ and .haechi/.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKDIR ?= .haechi/demo
BIN := .venv/bin
READY := .venv/ready

.PHONY: help demo test e2e lint typecheck compile manifests checkov images bench bench-serving clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-15s%s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY) ## run two rounds of the flywheel on this machine and open the result with a prediction
	$(BIN)/haechi demo --workdir $(WORKDIR)

test: $(READY) ## run the tests (those that need absent things skip with a reason)
	$(BIN)/python -m pytest -n 2 --dist loadfile

e2e: $(READY) ## run the tests that need a Kubernetes API server; kube-apiserver is built once, by Go, in minutes
	bash .ci/kube-apiserver
	bash .ci/kserve-controller || echo "KServe's own controller is not here: test_real_kserve.py will skip and say so"
	HAECHI_E2E_REQUIRED=1 $(BIN)/python -m pytest tests/e2e

lint: $(READY) ## check style, security rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint --strict .

typecheck: $(READY) ## check types of an installed wheel, strictly
	bash .ci/typecheck

compile: $(READY) ## compile the pipeline into pipelines/compiled
	$(BIN)/haechi compile

manifests: checkov ## check what kustomize makes of manifests/: schemas, policies, alerts, checkov
	$(BIN)/python -m pytest -q tests/test_manifests.py tests/test_monitoring.py

# checkov pins much of what we use too, so it has an environment of its own; where it cannot be had, its test skips.
checkov: $(READY)
	test -x .venv/checkov/bin/checkov || { $(BIN)/uv venv --quiet --python $(BIN)/python .venv/checkov \
	  && $(BIN)/uv pip install --quiet --python .venv/checkov/bin/python --exclude-newer 2026-11-15T00:00:00Z checkov==3.3.30; } \
	  || { rm -rf .venv/checkov; echo "checkov could not be installed: its test will skip"; }

bench: bench-serving ## measure against peers; ratios, raw figures and JSON in .haechi/bench

bench-serving: $(READY) ## the runtime against a bare loop, Ultralytics and the kserve server
	$(BIN)/python -m tests.bench.serving

images: ## build the container images (IMAGES=, BASE=, REGISTRY=, TAG=, ENGINE=, see .ci/images)
	.ci/images

clean: ## remove the environment, the working folders and build metadata
	rm -rf .venv .haechi build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
