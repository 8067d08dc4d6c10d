# Shared by run_basic_speedrun.sh, run_mup_width.sh and run_mup_width_group_scaling.sh, which source it.
#
# In the environment: SOURCE, the text (fineweb-edu by default; climbmix, pydocs, local:DIR, bin:DIR with tokens that are
# ready, bin:fineweb10B for those of the speedrun); NPROC_PER_NODE, the GPUs (default: all); WANDB_RUN, the name in
# Weights & Biases (default: not there), to which the width is added; WANDB_PROJECT; NANOCHAT_BASE_DIR, where all is kept.
# Call it again to continue: a run goes on from its last checkpoint, and one that is finished is not repeated.
# What must be there first: for text, `python -m nanochat.dataset -n 16 --source=SOURCE`, and then a tokenizer,
# `python -m scripts.tok_train --source=SOURCE`; for bin:fineweb10B only
# `python -m scripts.data_process.download --dataset=fineweb10B`.
SCRIPT=scripts/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source dev/stages.sh
STOPPED_CODE=75 NANOCHAT_CONTINUE="bash $SCRIPT$(printf ' %q' "$@")"

# arguments "NAME NAME ..." WORD...: words into the variables of these names; further words are flags of base_train and
# go into EXTRA. Too few words show the comments at the top of the script and of this file. base_train refuses flags that
# it does not know or that are given twice; widths are checked here, since a bad one could come after hours of another.
arguments() {
  local names name word head_dim=128
  read -r -a names <<<"$1" && shift
  if [ $# -lt ${#names[@]} ]; then
    awk 'FNR == 1 { top = 1 } !/^#/ { top = 0 } top && !/^#!/ { sub(/^# ?/, ""); print }' "$SCRIPT" scripts/width_runs.sh >&2
    exit 2
  fi
  for name in "${names[@]}"; do printf -v "$name" %s "$1" && shift; done
  EXTRA=()
  for word in "$@"; do
    name=${word%%=*}
    EXTRA+=("${name//_/-}${word#"$name"}")
    if [ "${name//_/-}" = --head-dim ]; then head_dim=${word#*=}; fi
  done
  [[ $STEPS =~ ^[1-9][0-9]*$ && $SEED =~ ^[0-9]+$ ]] || refuse "STEPS=$STEPS SEED=$SEED: expected whole numbers, STEPS above 0"
  for word in ${WIDTH-} ${BASE_WIDTH-} ${WIDTHS-}; do
    [[ $word =~ ^[1-9][0-9]*$ && $head_dim =~ ^[1-9][0-9]*$ ]] && [ $((word % head_dim)) -eq 0 ] ||
      refuse "width $word is no multiple of the head width $head_dim (--head-dim)"
  done
}

refuse() {
  echo "error: $*" >&2 && exit 1
}

# Sets up the environment, LAUNCH (what starts training on all GPUs) and RECIPE (what all runs share).
prepare() {
  local processes default
  export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
  source dev/setup.sh
  processes=$(python -m nanochat.launch --show=processes)
  LAUNCH=(python -m)
  if [ "$processes" -gt 1 ]; then LAUNCH+=(nanochat.launch -- -m); fi
  # The record's model and batch. Rows are long, because rows of whole documents leave out less text when they are, and
  # three of them are the 49,152 tokens that the record has on each GPU. What EXTRA says replaces these.
  RECIPE=(--arch=speedrun --source="${SOURCE:-fineweb-edu}" --resume=auto ${EXTRA[@]+"${EXTRA[@]}"})
  for default in --depth=12 --head-dim=128 --max-seq-len=16384 --total-batch-size=393216 --device-batch-size=3 \
    --eval-every=125 --core-metric-every=-1 --sample-every=-1 --save-every=250; do
    case " ${EXTRA[*]-}" in *" ${default%%=*}="*) ;; *) RECIPE+=("$default") ;; esac
  done
}

# train TAG SUFFIX FLAG...: one run; SUFFIX tells its name in Weights & Biases from others. After a signal training saves
# its state, and no other run follows.
train() {
  local tag=$1 name=${WANDB_RUN:-dummy}
  case $name in dummy | auto) ;; *) name=$name-$2 ;; esac # these two mean something to base_train
  attend env NANOCHAT_RUN_ID="$tag" "${LAUNCH[@]}" scripts.base_train --model-tag="$tag" --run="$name" "${@:3}" \
    "${RECIPE[@]}" || exit $?
  # training that someone else has stopped saves, and ends with 0 as well
  if [ ! -e "$NANOCHAT_BASE_DIR/checkpoints/base/$tag/COMPLETE" ]; then
    echo "$tag: stopped before its last step; call again to continue" >&2
    exit "$STOPPED_CODE"
  fi
}
