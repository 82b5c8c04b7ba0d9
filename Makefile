# quantc's two commands: `make demo` and `make test`.
SHELL := /bin/bash
CARGO ?= cargo
OUT ?= target/demo

.PHONY: demo test lint deps nvrtc bench clean-demo onnx-nodes onnx-text gpu-check

# LLVM 19 from Debian's packages, unless it is there.
deps:
	@command -v llvm-config-19 >/dev/null 2>&1 || tests/install-deps.sh

# NVIDIA's compiler library and disassembler as Python wheels, for the tests of CUDA kernels; those say so without them.
NVRTC := target/nvrtc
WHEELS := 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cuda-nvdisasm==13.*'
nvrtc:
	@[ -n "$$QUANTC_NVRTC" ] || [ -d $(NVRTC)/nvidia ] || { \
	  python3 -m pip install --quiet --retries 1 --timeout 15 --no-deps --target $(NVRTC) $(WHEELS) >/dev/null 2>&1 || \
	  uv pip install --quiet --no-deps --target $(NVRTC) $(WHEELS) >/dev/null 2>&1 || \
	  echo "NVRTC cannot be fetched: CUDA kernels are not compiled in tests"; }

demo: deps
	$(CARGO) build --release --quiet
	@tests/demo.sh target/release/quantc tests/models/tales-3M tests/models/tales_eval.txt $(OUT)

# Format, lints, and every test of every package.
test: deps lint nvrtc
	INSTA_UPDATE=no $(CARGO) test --quiet

# The second time as the tool is for machines without LLVM.
lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --quiet --all-targets -- -D warnings
	$(CARGO) clippy --quiet --no-default-features --features cuda -p quantc -- -D warnings

# The ONNX standard's node tests, for `cargo test -p quantc-frontends --test onnx_nodes`. Needs Python and its packages.
onnx-nodes:
	python3 -m venv target/onnx-venv
	target/onnx-venv/bin/pip install --quiet onnx==1.23.2
	target/onnx-venv/bin/python frontends/tests/onnx_nodes/make_cases.py target/onnx-nodes

# Tiny text models of ONNX exporters, for `cargo test --test onnx_raising`. Needs Python and its packages; optimum has
# its own, older ones.
onnx-text:
	python3 -m venv target/onnx-text-venv
	target/onnx-text-venv/bin/pip install --quiet onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 \
		onnxruntime-genai==0.18.0 torch==2.15.0 transformers==5.24.0
	target/onnx-text-venv/bin/python frontends/tests/onnx_text/make_models.py target/onnx-text
	python3 -m venv target/onnx-optimum-venv
	target/onnx-optimum-venv/bin/pip install --quiet onnx==1.23.2 onnxruntime==1.31.1 torch==2.15.0 \
		transformers==4.57.6 optimum-onnx==0.1.0
	target/onnx-optimum-venv/bin/python frontends/tests/onnx_text/make_models.py target/onnx-text \
		--exporter optimum --exporter optimum-past

# What a machine with a GPU is asked, packed into one file: docs/gpu.md. Needs no GPU, and makes machine code with NVRTC.
GPU ?= cuda-sm90
LEAN := target/gpu-check/build
gpu-check: deps nvrtc
	$(CARGO) build --release --quiet
	$(CARGO) build --release --quiet --no-default-features --features cuda --target-dir $(LEAN)
	QUANTC_NVRTC=$${QUANTC_NVRTC:-$(NVRTC)/nvidia/cu13/lib} \
	  tests/gpu-check.sh target/release/quantc $(LEAN)/release target/gpu-check/out $(GPU)

bench: deps
	$(CARGO) bench --bench models
	$(CARGO) bench --bench quality
	$(CARGO) bench --bench kernels
