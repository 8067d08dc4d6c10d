#!/usr/bin/env bash
# All that is claimed of the speedrun architecture, of width and of the instruments, measured on one GPU into a folder:
#
#   SOURCE=local:/my/text bash benchmarks/width.sh OUT [MINUTES of the two transfer studies, each: 20]
#
# The text and its tokenizer must be in the store. What is there is not repeated: call it again to go on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?name a folder for the results} MINUTES=${2:-20} SOURCE=${SOURCE:-fineweb-edu}
mkdir -p "$OUT"

once() { # FILE COMMAND...: a command that leaves FILE in OUT
  local file=$1
  shift
  if [ -e "$OUT/$file" ]; then return; fi
  echo "--- $*"
  "$@" 2>&1 | tee "$OUT/${file%.*}.log"
}

once fp8.json python -m benchmarks.fp8 --out="$OUT/fp8.json"
once monitor.json python -m benchmarks.monitor --out="$OUT/monitor.json"
once speed.json python -m benchmarks.train_speed --arch=speedrun --vocab-size=50304 --max-seq-len=49152 \
  --device-batch-size=1 --out="$OUT/speed.json"
for arch in nanochat speedrun; do
  for rule in mup no-mup; do
    once "coord_${arch}_$rule/coord_check.json" python -m scripts.coord_check --arch="$arch" "--$rule" \
      --widths=128,256,512,1024,2048 --seeds=5 --out="$OUT/coord_${arch}_$rule" || true # the table says what was missed
  done
done
for optimizer in adamw muon; do
  python -m scripts.mup_transfer --source="$SOURCE" --widths=128,256,512,1024 --base-width=128 --control \
    --optimizer="$optimizer" --out="$OUT/transfer_$optimizer" --time-budget-minutes="$MINUTES" || true
done
