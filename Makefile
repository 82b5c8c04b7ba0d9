# quantc's two commands: `make demo` and `make test`.
SHELL := /bin/bash
CARGO ?= cargo
OUT ?= target/demo

.PHONY: demo test lint deps bench clean-demo

# LLVM 19 from Debian's packages, unless it is there.
deps:
	@command -v llvm-config-19 >/dev/null 2>&1 || tests/install-deps.sh

demo: deps
	$(CARGO) build --release --quiet
	@tests/demo.sh target/release/quantc tests/models/tales-3M tests/models/tales_eval.txt $(OUT)

# Format, lints, and every test of every package.
test: deps lint
	INSTA_UPDATE=no $(CARGO) test --quiet

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --quiet --all-targets -- -D warnings

bench: deps
	$(CARGO) bench --bench models
	$(CARGO) bench --bench quality
	$(CARGO) bench --bench kernels
