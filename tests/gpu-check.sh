#!/bin/bash
# Packs what a machine with a GPU is asked into one file below 64 MiB: the tool without LLVM, the kernels of the tables as
# machine code, engines of the bundled model, and plans of engines of 8 billion weights.
#   gpu-check.sh QUANTC LEAN-FOLDER OUT TARGET     QUANTC compiles; LEAN-FOLDER has quantc and gpu-check without LLVM
# SMALL=1 in the environment packs small tables, one preset and no plan: enough to see that it works.
set -e
quantc=$1 lean=$2 out=$3 target=$4
models=$(dirname "$0")/models
presets="bf16 w4a16-g128 w4a8-g32 w8a8 fp8" plans="bf16 w4a16-g128" small=
if [ -n "$SMALL" ]; then presets=w4a16-g128 plans= small=--small; fi
rm -rf "$out"
mkdir -p "$out/gpu-check"
cp "$lean/quantc" "$lean/gpu-check" "$out/gpu-check/"
strip "$out/gpu-check/quantc" "$out/gpu-check/gpu-check"
cp "$models/tales_eval.txt" "$out/gpu-check/"
compile() { "$quantc" compile "$@" --agreement 0 --store "$out/store" >"$out/log.txt" 2>&1 || { cat "$out/log.txt" >&2; exit 1; }; }
for preset in $presets; do
  for pair in "gpu:$target" cpu:cpu-avx2; do
    compile "$models/tales-3M" --target "${pair#*:}" --preset $preset --kv-cache bf16 -o "$out/gpu-check/$preset.${pair%%:*}"
  done
done
for preset in $plans; do
  [ -d "$out/model" ] || "$lean/gpu-check" model "$out/model"
  compile "$out/model" --target "$target" --preset $preset --context 2048 --chunk 512 -o "$out/engine"
  "$lean/gpu-check" plan "$out/engine" "$out/gpu-check/$preset.plan"
  rm -rf "$out/engine"
done
rm -rf "$out/model" "$out/store" "$out/log.txt"
"$out/gpu-check/gpu-check" pack "$out/gpu-check" --target "$target" $small
tar -C "$out" -czf "$out/gpu-check.tar.gz" gpu-check
size=$(stat -c %s "$out/gpu-check.tar.gz")
echo "$out/gpu-check.tar.gz: $size bytes, of"
(cd "$out/gpu-check" && du -sb --apparent-size -- * | sort -rn)
echo "The tools need these libraries, and the newest versions of these symbols of the C library:"
for tool in quantc gpu-check; do
  needed=$(objdump -p "$out/gpu-check/$tool" | awk '/NEEDED/ {print $2}' | tr '\n' ' ')
  echo "  $tool: $needed$(objdump -T "$out/gpu-check/$tool" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)"
done
echo "On a machine with a GPU:"
echo "  tar -xzf gpu-check.tar.gz && gpu-check/gpu-check run gpu-check > report.md"
[ "$size" -lt $((64 << 20)) ] || { echo "error: that is more than 64 MiB" >&2; exit 1; }
