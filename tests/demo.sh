#!/bin/bash
# Compiles the bundled model to int4 for this CPU, lets it tell a story, and prints what each preset costs and gains.
#   demo.sh QUANTC MODEL TEXT OUT [CALIBRATION-TEXT]
set -e
quantc=$1 model=$2 text=$3 out=$4 data=${5:-$(dirname "$2")/tales_calib.txt}
mkdir -p "$out"
export QUANTC_STORE=$out/store
field() { sed -E "s/.*\"$1\":([0-9.eE+-]+).*/\1/"; }
presets="f32 bf16 w8a8 w8a16 fp8 w4a16-g128 w4a16-gptq-g128 w4a16-g32 w4a8-g128 w4a8-gptq-g128 w4a8-g32 w3a16-gptq-g64"
echo "== compile"
"$quantc" compile "$model" --target host --preset w4a8-g32 -o "$out/w4a8-g32"
echo
echo "== run"
printf 'Once upon a time'
"$quantc" run "$out/w4a8-g32" --prompt "Once upon a time" --max-tokens 120
echo
echo "== presets"
printf '%-16s %10s %7s %11s %9s %9s %11s %10s\n' preset bytes bits perplexity KL "top-1" "prefill/s" "decode/s"
"$quantc" compile "$model" --target host --preset f32 -o "$out/f32" >/dev/null 2>&1
for p in $presets; do
  [ "$p" = f32 ] || [ "$p" = w4a8-g32 ] || "$quantc" compile "$model" --target host --preset "$p" --data "$data" -o "$out/$p" >/dev/null 2>&1
  scores=$("$quantc" eval "$out/$p" --text "$text" --against "$out/f32" --json 2>/dev/null)
  speed=$("$quantc" bench "$out/$p" --prompt-tokens 256 --gen-tokens 64 --json 2>/dev/null)
  bytes=$(echo "$speed" | field weight_bytes)
  streamed=$(echo "$speed" | field decode_bytes_per_token)
  weights=$("$quantc" inspect "$out/f32" --json 2>/dev/null | field decode_bytes_per_token)
  printf '%-16s %10d %7.2f %11.4f %9.5f %9.4f %11.0f %10.0f\n' "$p" "$bytes" \
    "$(awk "BEGIN { print 32 * $streamed / $weights }")" "$(echo "$scores" | field perplexity)" "$(echo "$scores" | field kl_mean)" \
    "$(echo "$scores" | field top1_agreement)" "$(echo "$speed" | field prefill_tok_s)" "$(echo "$speed" | field decode_tok_s)"
done
