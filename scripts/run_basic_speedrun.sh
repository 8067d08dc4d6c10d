#!/usr/bin/env bash
# One run of the speedrun architecture, in the standard parametrisation:
#
#   bash scripts/run_basic_speedrun.sh WIDTH STEPS SEED [--flags of scripts.base_train]
#   bash scripts/run_basic_speedrun.sh 768 1750 1337
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/width_runs.sh"
arguments "WIDTH STEPS SEED" "$@"
prepare
train "speedrun-w$WIDTH-i$STEPS-s$SEED" "w$WIDTH" --width="$WIDTH" --iterations="$STEPS" --seed="$SEED"
