#!/usr/bin/env bash
# The speedrun architecture under muP at several widths, all with the learning rates of the base width, one run each. Then
# a table of their losses, and whether wider is better at every recorded step; exit code 1 if not.
#
#   bash scripts/run_mup_width_group_scaling.sh BASE_WIDTH "WIDTH WIDTH ..." STEPS SEED [--flags of scripts.base_train]
#   bash scripts/run_mup_width_group_scaling.sh 256 "512 768 1024 1536" 1000 1337
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/width_runs.sh"
export WANDB_PROJECT=${WANDB_PROJECT:-speedrun-mup-group}
arguments "BASE_WIDTH WIDTHS STEPS SEED" "$@"
widths=$(for width in $BASE_WIDTH $WIDTHS; do echo "$width"; done | sort -n -u)
[ "$widths" != "$BASE_WIDTH" ] || refuse "no width but the base width $BASE_WIDTH"
prepare
tags=
for width in $widths; do
  tag=mup-group-w$width-base$BASE_WIDTH-i$STEPS-s$SEED
  train "$tag" "w$width" --mup --width="$width" --base-width="$BASE_WIDTH" --iterations="$STEPS" --seed="$SEED"
  tags=${tags:+$tags,}$tag
done
python -m scripts.mup_transfer --widths="$(paste -sd, <<<"$widths")" --compare-runs="$tags"
