# One verb per chore. Each does its own set-up, given Rust, Python 3.11+ and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

# Runs x steps of the model test in `make soak`, by backend.
SOAK_SIMULATED ?= 2000x50
SOAK_KVM ?= 500x50
SOAK_MSHV ?= 100x50
FAULTS := tests/model/test_model.py tests/rules/3_a_failed_call_changes_nothing/test_rollback.py
SOAKED := $(FAULTS) tests/processes/test_leaks.py tests/processes/test_races.py
# Seconds of the storm in `make soak`, on each backend and scheduler.
SOAK_STORM ?= 600
STORM := tests/model/test_storm.py
# Interrupts that a guest of KVM takes and accounts for, in each mode of a partition.
SOAK_TAKEN ?= 1000000
TAKEN := tests/guest/test_every_interrupt.py
# Random walks of the Rust core, passed to proptest as PROPTEST_CASES.
SOAK_WALKS ?= 100000
# Seconds for each fuzz target.
FUZZ_SECONDS ?= 120
FUZZ_TARGETS := msi fdinfo table operations msix
# Nothing is linked, so libFuzzer itself need not be there.
FUZZ_CLIPPY := CUSTOM_LIBFUZZER_PATH=/dev/null CARGO_TARGET_DIR=target/fuzz RUSTFLAGS="--cfg fuzzing" \
	cargo clippy --quiet --locked --manifest-path fuzz/Cargo.toml --bins -- --deny warnings
# Threads that run each test at once.
PARALLEL_THREADS ?= 4

.PHONY: help build-dev test programs parallel free-threaded soak interleavings broken mutants fuzz sanitize memcheck lint lab demo \
	bench wheel release pythons oldest-rust docs docs-serve stubs completions guest format clean
.DEFAULT_GOAL := help

help: ## Print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/ready: requirements-dev.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

build-dev: $(VENV)/ready ## Build the package into the virtual environment, for development
	$(BIN)/maturin develop --quiet --locked

test: build-dev ## Run every test: Rust's, then Python's on every backend of this machine
	cargo test --quiet --locked
	$(RUN) -m pytest $(PYTEST_ARGS)

programs: ## Install the programs that tests run: QEMU and its storage daemon, and binutils for the guest
	{ command -v qemu-storage-daemon && command -v qemu-system-x86_64 && command -v ld; } >/dev/null || \
		{ test "$$(id -u)" = 0 && apt-get -q update && \
			apt-get -qy install --no-install-recommends qemu-system-common qemu-system-x86 binutils; } || \
		{ echo "needs qemu-storage-daemon, qemu-system-x86_64, ld: apt install qemu-system-common qemu-system-x86 binutils"; exit 1; }

# Thread-unsafe tests are skipped here; `make test` runs them. The races start their own threads: one round of each is
# enough beside the other tests.
parallel: build-dev ## Run each Python test in several threads at once (PARALLEL_THREADS)
	MSHV_IRQFD_RACES=$${MSHV_IRQFD_RACES:-1} $(RUN) -m pytest --parallel-threads=$(PARALLEL_THREADS) --skip-thread-unsafe=True $(PYTEST_ARGS)

# An abi3 module does not load without the GIL, so maturin builds a second module, for that version alone.
# Written against the source of Python 3.13. Not yet run on 3.14, whose source could not be fetched.
FREE := target/free-threaded
FREE_RUN := PYTHON_GIL=0 $(FREE)/venv/bin/python -m pytest
free-threaded: export CARGO_TARGET_DIR := $(FREE)
free-threaded: ## Run the Python tests without the GIL, on a CPython 3.14 built for that (or on FREE_THREADED_PYTHON)
	python=$${FREE_THREADED_PYTHON:-$$(tools/free_threaded)} && "$$python" -m venv --clear $(FREE)/venv
	$(FREE)/venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	VIRTUAL_ENV=$(CURDIR)/$(FREE)/venv $(FREE)/venv/bin/maturin develop --quiet --locked
	MSHV_IRQFD_MODEL=$${MSHV_IRQFD_MODEL:-100x50} MSHV_IRQFD_RACES=$${MSHV_IRQFD_RACES:-20} $(FREE_RUN) $(PYTEST_ARGS)
	MSHV_IRQFD_RACES=1 $(FREE_RUN) --parallel-threads=$(PARALLEL_THREADS) --skip-thread-unsafe=True $(PYTEST_ARGS)

soak: export MSHV_IRQFD_STORM := $(SOAK_STORM)
soak: build-dev ## Run the model test, a storm and every failure at length, on every backend and in Rust, and print the counts
	MSHV_IRQFD_BACKENDS=simulated MSHV_IRQFD_MODEL=$(SOAK_SIMULATED) $(RUN) -m pytest -rP -k simulated $(FAULTS) $(STORM)
	MSHV_IRQFD_BACKENDS=kvm MSHV_IRQFD_MODEL=$(SOAK_KVM) $(RUN) -m pytest -rP -k "kvm or adopted" $(FAULTS) $(STORM)
	MSHV_IRQFD_BACKENDS=kvm MSHV_IRQFD_TAKEN=$(SOAK_TAKEN) $(RUN) -m pytest -rP -k kvm $(TAKEN)
	lab/build
	for scheduler in core root; do \
		MSHV_IRQFD_BACKENDS=mshv MSHV_IRQFD_MODEL=$(SOAK_MSHV) lab/run --scheduler $$scheduler --timeout 3600 \
			--env MSHV_IRQFD_BACKENDS --env MSHV_IRQFD_MODEL -- \
			$(RUN) -m pytest -p no:cacheprovider -rP -k mshv $(SOAKED) || exit 1; \
		MSHV_IRQFD_BACKENDS=mshv lab/run --scheduler $$scheduler --timeout $$(($(SOAK_STORM) + 300)) \
			--env MSHV_IRQFD_BACKENDS --env MSHV_IRQFD_STORM -- \
			$(RUN) -m pytest -p no:cacheprovider -rP -k mshv $(STORM) || exit 1; \
	done
	PROPTEST_CASES=$(SOAK_WALKS) cargo test --release --quiet --locked --lib irqfd::tests -- --nocapture

interleavings: ## Run the core's locks in many orders of threads (INTERLEAVINGS=n of each kind, 2000 by default)
	RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test --quiet --locked --lib interleavings

broken: build-dev ## Break each rule on purpose, and demand that the named tests fail (BROKEN="NAME..." to choose)
	$(RUN) tools/break_rules.py $(BROKEN)

mutants: ## Mutate the core in hundreds of small ways, and list the mutants that no Rust test notices (about an hour)
	cargo mutants --version >/dev/null 2>&1 || cargo install --locked cargo-mutants
	cargo mutants --jobs 1 --output target $(MUTANTS)

# cargo-fuzz and the sanitizers need nightly options; RUSTC_BOOTSTRAP makes the stable compiler accept them.
fuzz: export RUSTC_BOOTSTRAP := 1
fuzz: ## Fuzz the parsers of a caller's bytes, and the core with strings of operations (FUZZ_SECONDS each)
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	for target in $(FUZZ_TARGETS); do \
		cargo fuzz run $$target -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done

sanitize: export RUSTC_BOOTSTRAP := 1
sanitize: ## Run the Rust tests under the address and leak sanitizers
	RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/sanitize \
		cargo test --quiet --locked --lib --target x86_64-unknown-linux-gnu

memcheck: build-dev ## Run a smoke test of the Python package under valgrind, for bad accesses and leaks of its own
	command -v valgrind >/dev/null || { test "$$(id -u)" = 0 && apt-get -qy install valgrind; } || \
		{ echo "needs valgrind: apt install valgrind"; exit 1; }
	cargo build --quiet --locked --features python
	$(RUN) tools/memcheck.py

lint: build-dev ## Check format, style, types, and the stub against the module
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --quiet --locked --all-targets --all-features -- --deny warnings
	cargo clippy --quiet --locked --all-targets -- --deny warnings
	$(FUZZ_CLIPPY)
	$(RUN) tools/import_floors.py --check
	$(RUN) tools/break_rules.py --check
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy
	$(RUN) -m mypy.stubtest mshv_irqfd
	PYTHONPATH=python $(BIN)/basedpyright --pythonpath $(RUN) --verifytypes mshv_irqfd >target/types.txt || \
		{ cat target/types.txt; exit 1; }
	$(RUN) tools/stub_docs.py --check
	$(RUN) tools/completions.py --check
	$(RUN) tools/error_messages.py --check

lab: build-dev ## Run the suite on the real mshv driver, in a kernel of its own under QEMU (built the first time)
	lab/check

demo: build-dev ## Show a few routes at work on the best kernel interface of this machine
	$(BIN)/mshv-irqfd demo

# The release stays in the virtual environment until the next verb that needs build-dev.
bench: $(VENV)/ready ## Build a release into the virtual environment and measure it (BENCH_ARGS="--backend kvm --quick")
	$(BIN)/maturin develop --quiet --locked --release
	$(BIN)/mshv-irqfd bench $(BENCH_ARGS)

$(VENV)/release-ready: $(VENV)/ready requirements-release.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-release.txt
	touch $@

wheel: $(VENV)/release-ready ## Build the sdist and the manylinux wheel into dist/
	$(RUN) tools/release.py --build-only

# A package index shows the README alone: FILES_URL is the address below which its readers find the other files.
release: $(VENV)/release-ready ## Build the sdist and the wheel into dist/ and check both; publish nothing (FILES_URL=...)
	$(RUN) tools/release.py $(if $(FILES_URL),--files "$(FILES_URL)")

pythons: ## Run tests with the wheel of `make wheel` on CPython 3.11, 3.13, 3.14 and 3.15 of Debian (PYTHONS, PYTEST_ARGS)
	$(RUN) tools/debian.py pythons $(PYTHONS) -- $(PYTEST_ARGS)

oldest-rust: $(VENV)/ready ## Build with the oldest rustc that the crate claims to need
	$(RUN) tools/debian.py rust

$(VENV)/docs: $(VENV)/ready requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt
	touch $@

docs: $(VENV)/docs ## Build the docs site into target/site; warnings and broken links are errors
	$(RUN) tools/docs_site.py

docs-serve: $(VENV)/docs ## Serve the docs site on this machine, and rebuild it on every change
	$(BIN)/zensical serve

stubs: build-dev ## Write the module's docstrings into its stub
	$(RUN) tools/stub_docs.py

completions: build-dev ## Write the command line's completion scripts
	$(RUN) tools/completions.py

guest: ## Assemble the guest that counts interrupts (python/mshv_irqfd/_guest)
	command -v as >/dev/null || { test "$$(id -u)" = 0 && apt-get -qy install binutils; } || \
		{ echo "needs as and ld: apt install binutils"; exit 1; }
	$(PYTHON) tools/assemble_guest.py

format: $(VENV)/ready ## Format all sources
	cargo fmt
	cargo fmt --manifest-path fuzz/Cargo.toml
	$(BIN)/ruff check --quiet --fix --exit-zero .
	$(BIN)/ruff format --quiet .

clean: ## Remove all build output and the virtual environment
	rm -rf target dist $(VENV)
	find python -name '*.so' -delete
