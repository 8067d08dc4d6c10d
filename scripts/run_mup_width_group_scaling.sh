#!/usr/bin/env bash
# The speedrun architecture under muP at several widths, all with the learning rates of the base width, one run each. Then
# a table of their losses, and the answer to whether wider is better at every recorded step; it ends with 1 if not.
#
#   bash scripts/run_mup_width_group_scaling.sh BASE_WIDTH "WIDTH WIDTH ..." STEPS SEED [--flags of scripts.base_train]
#   bash scripts/run_mup_width_group_scaling.sh 256 "512 768 1024 1536" 1000 1337
#
# Which rate is best at each width is another question: python -m scripts.mup_transfer answers it.
#
# In the environment: SOURCE, the text (fineweb-edu by default; climbmix, pydocs, local:DIR, bin:DIR with tokens that are
# ready, bin:fineweb10B for those of the speedrun); NPROC_PER_NODE, the GPUs (default: all); WANDB_RUN, the name in
# Weights & Biases (default: not there), to which -wWIDTH is added, in the project WANDB_PROJECT (default:
# speedrun-mup-group); NANOCHAT_BASE_DIR, where all is kept. Call it again to continue: a run goes on from its last
# checkpoint, and one that is finished is not repeated.
#
# What must be there first: for text, `python -m nanochat.dataset -n 16 --source=SOURCE`, and then a tokenizer,
# `python -m scripts.tok_train --source=SOURCE`; for bin:fineweb10B only
# `python -m scripts.data_process.download --dataset=fineweb10B`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../dev/width_runs.sh"
export WANDB_PROJECT=${WANDB_PROJECT:-speedrun-mup-group}

[ $# -ge 4 ] || usage
BASE=$1 STEPS=$3 SEED=$4
read -r -a GIVEN <<<"$2"
take_flags "${@:5}"
[ ${#GIVEN[@]} -gt 0 ] || stop "no widths: give them in quotes, as in \"512 768 1024\""
for width in "$BASE" "${GIVEN[@]}"; do check_width WIDTH "$width"; done
whole STEPS "$STEPS" 1
whole SEED "$SEED" 0
read -r -a WIDTHS <<<"$(printf '%s\n' "$BASE" "${GIVEN[@]}" | sort -n -u | tr '\n' ' ')"
[ ${#WIDTHS[@]} -gt 1 ] || stop "$2: no width differs from the base width $BASE"
prepare
TAGS=()
for width in "${WIDTHS[@]}"; do
  tag=mup-group-w$width-base$BASE-i$STEPS-s$SEED
  train "$tag" "w$width" --mup --width="$width" --base-width="$BASE" --iterations="$STEPS" --seed="$SEED"
  TAGS+=("$tag")
done
IFS=,
python -m scripts.mup_transfer --widths="${WIDTHS[*]}" --compare-runs="${TAGS[*]}"
