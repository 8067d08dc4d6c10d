#!/usr/bin/env bash
# One run of the speedrun architecture under muP, with the learning rates of the base width:
#
#   bash scripts/run_mup_width.sh WIDTH BASE_WIDTH STEPS SEED [--flags of scripts.base_train]
#   bash scripts/run_mup_width.sh 1024 768 1000 1337
#
# In the environment: SOURCE, the text (fineweb-edu by default; climbmix, pydocs, local:DIR, bin:DIR with tokens that are
# ready, bin:fineweb10B for those of the speedrun); NPROC_PER_NODE, the GPUs (default: all); WANDB_RUN, the name in
# Weights & Biases (default: not there), to which -wWIDTH-baseBASE_WIDTH is added, in the project WANDB_PROJECT (default:
# speedrun-mup); NANOCHAT_BASE_DIR, where all is kept. Call it again to continue: a run goes on from its last
# checkpoint, and one that is finished is not repeated.
#
# What must be there first: for text, `python -m nanochat.dataset -n 16 --source=SOURCE`, and then a tokenizer,
# `python -m scripts.tok_train --source=SOURCE`; for bin:fineweb10B only
# `python -m scripts.data_process.download --dataset=fineweb10B`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../dev/width_runs.sh"
export WANDB_PROJECT=${WANDB_PROJECT:-speedrun-mup}

[ $# -ge 4 ] || usage
WIDTH=$1 BASE=$2 STEPS=$3 SEED=$4
take_flags "${@:5}"
check_width WIDTH "$WIDTH"
check_width BASE_WIDTH "$BASE"
whole STEPS "$STEPS" 1
whole SEED "$SEED" 0
prepare
train "mup-w$WIDTH-base$BASE-i$STEPS-s$SEED" "w$WIDTH-base$BASE" \
  --mup --width="$WIDTH" --base-width="$BASE" --iterations="$STEPS" --seed="$SEED"
