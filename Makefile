# The project's commands; `make help` lists them. Anything longer than a few lines is a program of its own.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# Static binaries: for the guest's and the L1 host's initramfs. A target of its own keeps these flags away from
# build scripts and procedural macros.
TRIPLE := x86_64-unknown-linux-gnu
STATIC := --release --target $(TRIPLE) --config 'target.$(TRIPLE).rustflags=["-C","target-feature=+crt-static"]'
NESTED := target/$(TRIPLE)/release/nested

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what building and testing needs (Debian packages, the L1 host's kernel)
	@tools/setup

.PHONY: nested-binary
nested-binary: setup
	@cargo build -q -p nested $(STATIC)

.PHONY: nested
nested: nested-binary ## run CMD='...' as root where KVM works; LIMIT=seconds, ARGS=options of `nested run`
	@$(NESTED) run $(if $(LIMIT),--time-limit $(LIMIT)) $(ARGS) -- bash -c "$$CMD"
# As it was typed: dollar signs are for the shell in the L1 host.
nested: export override CMD := $(value CMD)

.PHONY: nested-up
nested-up: nested-binary ## boot the L1 host that `make nested` then uses until `make nested-down`; ARGS=options
	@$(NESTED) up $(ARGS)

.PHONY: nested-down
nested-down: nested-binary ## take that L1 host down
	@$(NESTED) down
