#!/usr/bin/env bash
# All that is claimed of the speedrun architecture, of width and of the instruments, measured on one GPU into a folder:
#
#   SOURCE=local:/my/text bash benchmarks/width.sh OUT [MINUTES of each transfer study: 30]
#
# The text and a tokenizer of 8,192 tokens must be in the store (`python -m nanochat.dataset`, `python -m scripts.tok_train
# --vocab-size=8192`, each with --source). What is there is not repeated: call it again to go on. PROCESSES (4) share the
# runs of a study, since narrow models leave a GPU idle. docs/width.md took 25 minutes of an H100 with 16 cores, with one
# seed and fewer rates in places.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?name a folder for the results} MINUTES=${2:-30} SOURCE=${SOURCE:-fineweb-edu} PROCESSES=${PROCESSES:-4}
mkdir -p "$OUT"

once() { # FILE COMMAND...: a command that leaves FILE in OUT
  local file=$1
  shift
  if [ -e "$OUT/$file" ]; then return; fi
  echo "--- $*"
  mkdir -p "$(dirname "$OUT/$file")"
  "$@" 2>&1 | tee "$OUT/${file%.*}.log"
}

study() { # NAME FLAG...: the sweep of that name, made by several processes
  local name=$1
  shift
  local command=(python -m scripts.mup_transfer --source="$SOURCE" --widths=128,256,512,1024 --base-width=128 --depth=4
    --steps=400 --total-batch-size=16384 --device-batch-size=32 --eval-tokens=262144 --time-budget-minutes="$MINUTES"
    --out="$OUT/transfer_$name" "$@")
  echo "--- ${command[*]}"
  for ((i = 1; i <= PROCESSES; i++)); do
    "${command[@]}" >"$OUT/transfer_$name.$i.log" 2>&1 &
    sleep 2 # one after the other looks for what is free
  done
  wait
  "${command[@]}" # what another process left, and the report
}

once fp8.json python -m benchmarks.fp8 --out="$OUT/fp8.json"
once monitor.json python -m benchmarks.monitor --out="$OUT/monitor.json"
for fp8 in none head all; do
  once "speed_$fp8.json" python -m benchmarks.train_speed --depth=12 --arch=speedrun --vocab-size=50304 --fp8="$fp8" \
    --max-seq-len=49152 --device-batch-size=1 --total-batch-size=393216 --out="$OUT/speed_$fp8.json"
done
for arch in nanochat speedrun; do
  for rule in mup no-mup; do
    once "coord_${arch}_$rule/coord_check.json" python -m scripts.coord_check --arch="$arch" "--$rule" \
      --widths=128,256,512,1024,2048 --seeds=5 --out="$OUT/coord_${arch}_$rule" || true # the table says what was missed
  done
done
once coord_nanochat_adamw/coord_check.json python -m scripts.coord_check --optimizer=adamw \
  --widths=128,256,512,1024,2048 --seeds=5 --out="$OUT/coord_nanochat_adamw" || true
# the control first, of one seed: it is what costs the most and says the least with more
for optimizer in muon adamw; do
  rates=0.125,0.25,0.5,1,2,4,8
  study "$optimizer" --optimizer="$optimizer" --multipliers="$rates" --seeds=1 --control
  study "$optimizer" --optimizer="$optimizer" --multipliers="$rates" --seeds=3
done
study muon_head --optimizer=muon --sweep=head --multipliers=0.125,0.25,0.5,1,2,4 --seeds=3 --control
