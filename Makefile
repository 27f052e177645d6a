# One verb a chore. Each does all the set-up that it needs, beyond Rust, Python 3.11+ and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: help build-dev test lint lab demo wheel stubs format clean
.DEFAULT_GOAL := help

help: ## Says what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/ready: requirements-dev.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

build-dev: $(VENV)/ready ## Builds the package into the virtual environment, for development
	$(BIN)/maturin develop --quiet --locked

test: build-dev ## Runs every test: Rust's, then Python's on every backend that this machine has
	cargo test --quiet --locked
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: build-dev ## Checks format, style, types, and the stub against the module
	cargo fmt --check
	cargo clippy --quiet --locked --all-targets --all-features -- --deny warnings
	cargo clippy --quiet --locked --all-targets -- --deny warnings
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	$(RUN) -m mypy.stubtest mshv_irqfd
	$(RUN) tools/stub_docs.py --check

lab: build-dev ## Runs the suite against the real mshv driver in a kernel of its own (QEMU; builds it the first time)
	lab/check

demo: build-dev ## Shows the life of a few routes on the best kernel interface of this machine
	$(BIN)/mshv-irqfd demo

wheel: $(VENV)/ready ## Builds the wheel into dist/
	rm -rf dist
	$(BIN)/maturin build --quiet --release --locked --out dist

stubs: build-dev ## Writes the module's docstrings into its stub
	$(RUN) tools/stub_docs.py

format: $(VENV)/ready ## Formats all sources
	cargo fmt
	$(BIN)/ruff check --quiet --fix --exit-zero .
	$(BIN)/ruff format --quiet .

clean: ## Removes what was built
	rm -rf target dist $(VENV)
	find python -name '*.so' -delete
