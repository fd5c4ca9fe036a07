# Mandoline's front doors: `make demo` and `make test`. Each does all that it needs on a fresh
# Debian machine with a Rust toolchain, and does nothing twice.

SHELL := /bin/bash
STEP := scripts/step
BENCH ?= boot

# Where the builders put images; each prints its directory as its only line on stdout.
KERNEL := guest-image/kernel/build
ROOT := guest-image/root/build
NODE := guest-image/node/build
CLOUD := guest-image/cloud-kernel/build

.PHONY: help demo test bench soak fuzz fuzz-short setup build images test-images check deny unit image-tests lab-tests doctor clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup images build ## A slice with a running sliver that you can ssh into (KEEP=1 leaves it up)
	@scripts/with-images target/release/mandoline demo $(if $(KEEP),--keep)

test: setup check deny unit fuzz-short images test-images build image-tests lab-tests ## Everything that proves that it works
	@printf '\nall tests passed\n'

bench: setup images build ## Benchmarks in a lab node: make bench BENCH=boot
	@$(STEP) "benchmark $(BENCH)" scripts/with-images target/release/mandoline-perf $(BENCH)

soak: setup images build ## The long tests: what an idle sliver writes in five minutes, 300 deaths of monitors and node manager
	@$(STEP) "soak tests" scripts/with-images python3 tests/e2e/soak_idle_disk.py
	@$(STEP) "deaths" env MANDOLINE_ROUNDS=300 scripts/with-images cargo test --release -p mandoline-lab --test durability -- --ignored --exact death_at_any_point_leaks_nothing

fuzz: ## Fuzz one target of the monitor: make fuzz TARGET=blk SECONDS=600
	@scripts/fuzz $(TARGET) $(SECONDS)

setup: ## Install what is missing, or say what to install
	@scripts/setup

build: ## The programs, optimised
	@$(STEP) "programs" cargo build --release --workspace --exclude mandoline-vmm
	@$(STEP) "monitor" scripts/build-monitor

images: ## Sliver kernel, sliver root image, node image (cached)
	@$(STEP) "sliver kernel (the first build takes about five minutes)" $(KERNEL) up >/dev/null
	@$(STEP) "sliver root image" $(ROOT) >/dev/null
	@$(STEP) "node image" $(NODE) >/dev/null
	@$(STEP) "QEMU for lab nodes" guest-image/node/qemu >/dev/null

test-images: ## Kernels that only tests and benchmarks start: flavour smp, Debian's cloud kernel (cached)
	@$(STEP) "sliver kernel smp (the first build takes about six minutes)" $(KERNEL) smp >/dev/null
	@$(STEP) "Debian's kernel for slivers" $(CLOUD) >/dev/null

check: ## Formatting and lints
	@$(STEP) "rustfmt" cargo fmt --all --check
	@$(STEP) "clippy" cargo clippy --workspace --all-targets --quiet -- -D warnings

deny: ## Licences and bans of what is linked in
	@$(STEP) "cargo deny" scripts/cargo-deny

unit: ## Unit, property and payload tests
	@$(STEP) "unit, property and payload tests" cargo test --workspace --quiet

fuzz-short: ## A few seconds of fuzzing for each target
	@$(STEP) "fuzzing, 2 s a target" scripts/fuzz --short

image-tests: ## Do the images keep their promises?
	@$(STEP) "kernel tests" guest-image/kernel/test
	@$(STEP) "root image tests" guest-image/root/test
	@$(STEP) "cloud kernel tests" guest-image/cloud-kernel/test

lab-tests: ## Real slivers in a lab node
	@$(STEP) "lab tests" scripts/with-images scripts/lab-tests
	@$(STEP) "first light, over PLCAPI" scripts/with-images python3 tests/e2e/test_first_light.py

doctor: ## What is missing on this machine, and how to get it
	@cargo run --quiet --release -p mandoline -- doctor

clean: ## Remove what was compiled (cached images stay: see `make clean-cache`)
	cargo clean

clean-cache: ## Remove the cached images
	rm -rf "$${MANDOLINE_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/mandoline}"
