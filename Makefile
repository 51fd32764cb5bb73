# The project's commands; `make help` lists them. Anything longer than a few lines is a program of its own.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.DELETE_ON_ERROR:

# All paths below are fixed to the checkout.
export CARGO_TARGET_DIR := $(CURDIR)/target
PREFIX ?= /usr

# Static binaries: for the guest's and the L1 host's initramfs. A target triple keeps these flags away from build
# scripts and procedural macros.
TRIPLE := x86_64-unknown-linux-gnu
STATIC := --release --target $(TRIPLE) --config 'target.$(TRIPLE).rustflags=["-C","target-feature=+crt-static"]'
NESTED := target/$(TRIPLE)/release/nested
export NESTED_PROGRAM := $(CURDIR)/$(NESTED)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what building and testing needs: Debian packages, the L1 host's kernel
	@tools/setup

## Building

.PHONY: build
build: setup binaries guest ## all release binaries, in target/release, and the guest, in target/guest

.PHONY: binaries
binaries: setup
	cargo build --release -p agent -p shim
	cargo build -p vmm --bin eci-vmm $(STATIC)
	@mkdir -p target/release
	@cmp -s target/$(TRIPLE)/release/eci-vmm target/release/eci-vmm || \
		install target/$(TRIPLE)/release/eci-vmm target/release/eci-vmm

.PHONY: guest
guest: setup guest-init target/guest/vmlinux

.PHONY: guest-init
guest-init: setup
	cargo build -p guest-init $(subst --release,--profile guest,$(STATIC))
	@mkdir -p target/release
	@cmp -s target/$(TRIPLE)/guest/eci-guest-init target/release/eci-guest-init || \
		cp target/$(TRIPLE)/guest/eci-guest-init target/release/eci-guest-init
	@guest-init/pack-initramfs target/release/eci-guest-init target/guest/initramfs.cpio

target/guest/vmlinux: kernel-config/build $(wildcard kernel-config/fragments/* kernel-config/patches/*) | setup
	kernel-config/build $(CURDIR)/$@
	@touch $@

.PHONY: install
install: build ## install binaries and guest below DESTDIR and PREFIX (/usr)
	install -D -t $(DESTDIR)$(PREFIX)/bin \
		$(addprefix target/release/,eci-agent ecictl containerd-shim-eci-v2 eci-vmm)
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/eci target/guest/vmlinux target/guest/initramfs.cpio

## Where KVM works: docs/test-bed.md

.PHONY: nested-binary
nested-binary: setup
	@cargo build -q -p nested $(STATIC)

.PHONY: nested
nested: nested-binary ## run CMD='...' as root where KVM works; LIMIT=seconds, ARGS='options of nested run'
	@$(NESTED) run $(if $(LIMIT),--time-limit $(LIMIT)) $(ARGS) -- bash -c "$$CMD"
# As it was typed: dollar signs are for the shell in the L1 host.
nested: export override CMD := $(value CMD)

.PHONY: nested-up
nested-up: nested-binary ## boot the L1 host that `make nested` then uses until `make nested-down`; ARGS='options'
	@$(NESTED) up $(ARGS)

.PHONY: nested-down
nested-down: nested-binary ## take that L1 host down
	@$(NESTED) down

.PHONY: nested-test
nested-test: nested-binary ## run `cargo test $(ARGS)` with each test program where KVM works
	@CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(CURDIR)/$(NESTED) run --" cargo test $(ARGS)

## Testing

.PHONY: test
test: build nested-binary images sdks ## `make check` and all tests; those that need KVM run in the L1 host
	@ECI_SDK_PYTHON=$(CURDIR)/target/sdk/bin/python tests/run

.PHONY: images
images: setup
	@tests/demo/build-images target/demo

.PHONY: sdks
sdks: setup
	@tests/sdk/install target/sdk

.PHONY: bench
bench: build nested-binary ## measure start time and memory against QEMU; ARGS='options': docs/benchmarks.md
	@tests/bench/build-image target/bench/image
	cargo build --release -p tests --bin bench
	$(NESTED) run --counted-time --fresh --memory 8192 -- target/release/bench --summary target/bench/summary.json $(ARGS)

.PHONY: check
check: setup ## format, lints, documentation, architecture, licences and sources of dependencies
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' cargo doc -q --workspace --no-deps --document-private-items --locked
	cargo test -q -p tests --test architecture
	@tools/setup cargo-deny
	PATH="$$(tools/setup --tools-path):$$PATH" cargo deny --all-features check bans licenses sources

.PHONY: fuzz
fuzz: setup ## run each fuzz target for FUZZ_SECONDS (60); ARGS='TARGET...' for some
	fuzz/run $(ARGS)

.PHONY: run
run: build nested-binary images ## show a container group at work, where KVM works
	$(NESTED) run -- tests/demo/run target/demo target/release target/guest
