#!/usr/bin/env bash
# One run of the speedrun architecture under muP, with the learning rates of the base width:
#
#   bash scripts/run_mup_width.sh WIDTH BASE_WIDTH STEPS SEED [--flags of scripts.base_train]
#   bash scripts/run_mup_width.sh 1024 768 1000 1337
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/width_runs.sh"
arguments "WIDTH BASE_WIDTH STEPS SEED" "$@"
prepare
train "mup-w$WIDTH-base$BASE_WIDTH-i$STEPS-s$SEED" "w$WIDTH-base$BASE_WIDTH" \
  --mup --width="$WIDTH" --base-width="$BASE_WIDTH" --iterations="$STEPS" --seed="$SEED"
