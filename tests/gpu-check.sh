#!/bin/bash
# Packs what a machine with a GPU is asked into one file below 64 MiB: the tool without LLVM, the kernels of the table as
# machine code, and engines of the bundled model.
#   gpu-check.sh QUANTC LEAN-FOLDER OUT TARGET     QUANTC compiles; LEAN-FOLDER has quantc and gpu-check without LLVM
set -e
quantc=$1 lean=$2 out=$3 target=$4
models=$(dirname "$0")/models
rm -rf "$out"
mkdir -p "$out/gpu-check"
cp "$lean/quantc" "$lean/gpu-check" "$out/gpu-check/"
strip "$out/gpu-check/quantc" "$out/gpu-check/gpu-check"
cp "$models/tales_eval.txt" "$out/gpu-check/"
"$out/gpu-check/gpu-check" pack "$out/gpu-check" --target "$target"
for preset in bf16 w4a16-g128 w4a8-g32 w8a8 fp8; do
  for pair in "gpu:$target" cpu:cpu-avx2; do
    "$quantc" compile "$models/tales-3M" --target "${pair#*:}" --preset $preset --kv-cache bf16 --agreement 0 \
      --store "$out/store" -o "$out/gpu-check/$preset.${pair%%:*}" >/dev/null 2>&1
  done
done
tar -C "$out" -czf "$out/gpu-check.tar.gz" gpu-check
size=$(stat -c %s "$out/gpu-check.tar.gz")
echo "$out/gpu-check.tar.gz: $size bytes. On a machine with a GPU:"
echo "  tar -xzf gpu-check.tar.gz && gpu-check/gpu-check run gpu-check > report.md"
[ "$size" -lt $((64 << 20)) ] || { echo "error: that is more than 64 MiB" >&2; exit 1; }
