# One verb a chore. Each does all the set-up that it needs, beyond Rust, Python 3.11+ and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

# Runs and steps of the model test at length, by backend.
SOAK_SIMULATED ?= 2000x50
SOAK_KVM ?= 500x50
SOAK_MSHV ?= 100x50
FAULTS := tests/model/test_model.py tests/rules/3_a_failed_call_changes_nothing/test_rollback.py
SOAKED := $(FAULTS) tests/processes/test_leaks.py tests/processes/test_races.py
# Random walks of the Rust core (PROPTEST_CASES is proptest's own name).
SOAK_WALKS ?= 100000
# Seconds that each fuzz target runs.
FUZZ_SECONDS ?= 120
FUZZ_TARGETS := msi fdinfo table operations
# In how many threads each test runs at once.
PARALLEL_THREADS ?= 4

.PHONY: help build-dev test parallel free-threaded soak interleavings broken mutants fuzz sanitize memcheck lint lab demo \
	wheel stubs format clean
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

# What threads would not share runs in `make test`. The races have threads of their own: once each is enough beside others.
parallel: build-dev ## Runs each Python test in several threads at once (PARALLEL_THREADS)
	MSHV_IRQFD_RACES=$${MSHV_IRQFD_RACES:-1} $(RUN) -m pytest --parallel-threads=$(PARALLEL_THREADS) --skip-thread-unsafe=True $(PYTEST_ARGS)

# An abi3 module does not load without the GIL: maturin builds one for this very version there, beside the other.
# Written against python3.13's source; not yet seen to pass on 3.14, whose source could not be fetched.
FREE := target/free-threaded
FREE_RUN := PYTHON_GIL=0 $(FREE)/venv/bin/python -m pytest
free-threaded: export CARGO_TARGET_DIR := $(FREE)
free-threaded: ## Runs the Python tests without the GIL, on a CPython 3.14 built for that (FREE_THREADED_PYTHON: on another)
	python=$${FREE_THREADED_PYTHON:-$$(tools/free_threaded)} && "$$python" -m venv --clear $(FREE)/venv
	$(FREE)/venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	VIRTUAL_ENV=$(CURDIR)/$(FREE)/venv $(FREE)/venv/bin/maturin develop --quiet --locked
	MSHV_IRQFD_MODEL=$${MSHV_IRQFD_MODEL:-100x50} MSHV_IRQFD_RACES=$${MSHV_IRQFD_RACES:-20} $(FREE_RUN) $(PYTEST_ARGS)
	MSHV_IRQFD_RACES=1 $(FREE_RUN) --parallel-threads=$(PARALLEL_THREADS) --skip-thread-unsafe=True $(PYTEST_ARGS)

soak: build-dev ## Runs the model and every failure at length on every backend and in Rust, and prints how much was tried
	MSHV_IRQFD_BACKENDS=simulated MSHV_IRQFD_MODEL=$(SOAK_SIMULATED) $(RUN) -m pytest -rP -k simulated $(FAULTS)
	MSHV_IRQFD_BACKENDS=kvm MSHV_IRQFD_MODEL=$(SOAK_KVM) $(RUN) -m pytest -rP -k "kvm or adopted" $(FAULTS)
	lab/build
	for scheduler in core root; do \
		MSHV_IRQFD_BACKENDS=mshv MSHV_IRQFD_MODEL=$(SOAK_MSHV) lab/run --scheduler $$scheduler --timeout 3600 \
			--env MSHV_IRQFD_BACKENDS --env MSHV_IRQFD_MODEL -- \
			$(RUN) -m pytest -p no:cacheprovider -rP -k mshv $(SOAKED) || exit 1; \
	done
	PROPTEST_CASES=$(SOAK_WALKS) cargo test --release --quiet --locked --lib irqfd::tests -- --nocapture

interleavings: ## Tries the core's locks in many orders of threads (INTERLEAVINGS=n of each kind, 2000 by default)
	RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test --quiet --locked --lib interleavings

broken: build-dev ## Breaks each rule on purpose, and demands that the named tests fail (BROKEN="NAME...", of tests/rules)
	$(RUN) tools/break_rules.py $(BROKEN)

mutants: ## Changes the core in hundreds of small ways and lists those that no Rust test notices (about an hour)
	cargo mutants --version >/dev/null 2>&1 || cargo install --locked cargo-mutants
	cargo mutants --jobs 1 --output target $(MUTANTS)

# cargo-fuzz and the sanitizers ask for a nightly compiler's options, which the stable one has under this name.
fuzz: export RUSTC_BOOTSTRAP := 1
fuzz: ## Fuzzes what parses a caller's bytes, and the core with strings of operations (FUZZ_SECONDS each)
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	for target in $(FUZZ_TARGETS); do \
		cargo fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done

sanitize: export RUSTC_BOOTSTRAP := 1
sanitize: ## Runs the Rust tests under the address and leak sanitizers
	RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/sanitize \
		cargo test --quiet --locked --lib --target x86_64-unknown-linux-gnu

memcheck: build-dev ## Runs a smoke test of the Python package under valgrind: bad accesses, and leaks of its own
	command -v valgrind >/dev/null || { test "$$(id -u)" = 0 && apt-get -qy install valgrind; } || \
		{ echo "needs valgrind: apt install valgrind"; exit 1; }
	cargo build --quiet --locked --features python
	$(RUN) tools/memcheck.py

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
