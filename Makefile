# Everything that is done with Windlass's source. On a fresh machine `make demo` and `make test` do all of it, set-up
# included. Set-up that needs root and has none prints the exact command.

# Always the whole workspace, so that features are the same for binaries and tests: wasmtime is built once per profile. What is
# tested is built in a profile of its own, in which the workspace's crates take less time to build.
CARGO      := cargo
PROFILE    := --release
BIN        := target/release
PLUGINS    := target/plugins
GUESTS     := target/test-guests
DEMO_ARGS  ?=
test lint soak: PROFILE := --profile quick
# What tests need besides cargo: HOW to get it is in tests/setup.sh.

.PHONY: build plugins guests demo dev test lint bench soak clean setup

build: setup
	$(CARGO) build $(PROFILE) --workspace --bins
	sh plugins/build.sh $(PLUGINS)

setup:
	@sh tests/setup.sh

guests: setup
	sh plugins/build.sh --guests $(GUESTS)

demo: build
	$(BIN)/windlass demo --plugins $(PLUGINS) $(DEMO_ARGS)

dev: build
	$(BIN)/windlass dev --plugins $(PLUGINS)

test: build guests
	$(CARGO) test $(PROFILE) --workspace --no-fail-fast
	$(CARGO) test $(PROFILE) -p windlass-store --all-features --no-fail-fast

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(PROFILE) --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(PROFILE) --workspace --no-deps --all-features
	sh tests/policy.sh

bench: build
	sh tests/bench.sh

# The long runs: kill loops and random schedules in full.
soak: build guests
	WINDLASS_SOAK_SECONDS=300 $(CARGO) test $(PROFILE) -p windlass-agent -p windlass-tests -- soak

clean:
	$(CARGO) clean
