# What scripts/run_basic_speedrun.sh, run_mup_width.sh and run_mup_width_group_scaling.sh share; they source it.
SCRIPT=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
  echo "error: $*" >&2
  exit 1
}

# Ends with the comment at the top of the script: how it is to be called.
usage() {
  sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$SCRIPT" >&2
  exit 2
}

# whole NAME VALUE LEAST: refuses anything but a whole number from LEAST on.
whole() {
  [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "$2" -ge "$3" ] || stop "$1=$2: expected a whole number, $3 or more"
}

# take_flags WORD...: what else goes to base_train, in EXTRA. What a script was told by its first words, or decides
# itself, cannot be said a second time.
take_flags() {
  local word name
  EXTRA=()
  for word in "$@"; do
    [[ $word =~ ^--[a-zA-Z][a-zA-Z0-9_-]*(=.*)?$ ]] || stop "$word: expected a flag of scripts.base_train as --name=value"
    name=${word%%=*}
    name=${name//_/-}
    case $name in
      --arch | --width | --mup | --no-mup | --base-width | --iterations | --num-iterations | --seed | --model-tag | \
        --source | --run | --resume) stop "$name: this script sets it itself; see its first lines" ;;
    esac
    EXTRA+=("$name${word#"${word%%=*}"}")
  done
}

# flag NAME DEFAULT: the value that EXTRA gives it.
flag() {
  local word found=$2
  for word in ${EXTRA[@]+"${EXTRA[@]}"}; do
    case $word in "$1="*) found=${word#*=} ;; esac
  done
  printf %s "$found"
}

# check_width NAME VALUE: refuses what no model can have.
check_width() {
  local head_dim
  head_dim=$(flag --head-dim 128)
  whole --head-dim "$head_dim" 2
  whole "$1" "$2" 1
  [ $(($2 % head_dim)) -eq 0 ] || stop "$1=$2 is no multiple of the head width $head_dim (--head-dim)"
}

# Sets the environment up: dependencies, LAUNCH (what starts training on all GPUs), SOURCE, RECIPE (what all runs share).
prepare() {
  local gpus=0 folder
  export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
  source dev/setup.sh
  if nvidia-smi --list-gpus >/dev/null 2>&1; then gpus=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
  NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 1 ? gpus : 1))}
  whole NPROC_PER_NODE "$NPROC_PER_NODE" 1
  LAUNCH=(python -m)
  if [ "$NPROC_PER_NODE" -gt 1 ]; then LAUNCH=(python -m nanochat.launch --nproc-per-node="$NPROC_PER_NODE" -- -m); fi

  SOURCE=${SOURCE:-fineweb-edu}
  if [[ $SOURCE == local:* ]]; then
    folder=$(cd "${SOURCE#local:}" 2>/dev/null && pwd -P) || stop "SOURCE=$SOURCE: no such folder"
    SOURCE=local:$folder
  fi

  # The record's model and batch. Rows are long, because rows of whole documents leave out less text when they are, and
  # three of them are the 49,152 tokens that the record has on each GPU. What EXTRA says stands instead.
  local default
  RECIPE=(--arch=speedrun --source="$SOURCE" --resume=auto)
  for default in --depth=12 --head-dim=128 --max-seq-len=16384 --total-batch-size=393216 --device-batch-size=3 \
    --eval-every=125 --core-metric-every=-1 --sample-every=-1 --save-every=250; do
    [ -n "$(flag "${default%%=*}" "")" ] || RECIPE+=("$default")
  done
  RECIPE+=(${EXTRA[@]+"${EXTRA[@]}"})
}

# deciding WORD...: those of base_train's flags that decide what the weights become, a line each, in an order of their
# own. The others are OBSERVERS in nanochat/train/run_folder.py: a finished run is not trained again for the sake of those.
deciding() {
  local word name
  for word in "$@"; do
    name=${word%%=*}
    case ${name/#--no-/--} in
      --run | --eval-every | --eval-tokens | --core-metric-every | --core-metric-max-per-task | --sample-every | \
        --save-every | --resume | --device-type | --device-batch-size | --model-tag | --parallel | --use-fsdp | \
        --keep-last | --keep-every | --monitor-interval | --coord-check | --coord-check-every | --warm-kernels) ;;
      *) echo "$word" ;;
    esac
  done | sort
}

# run_name SUFFIX: the name in Weights & Biases and of the log folder. Runs of several widths are told apart by it;
# "dummy" and "auto" mean something to base_train and stay as they are.
run_name() {
  local name=${WANDB_RUN:-dummy}
  case $name in
    dummy | auto) echo "$name" ;;
    *) echo "$name-$1" ;;
  esac
}

# train TAG SUFFIX FLAG...: one run, unless the same one is finished. SUFFIX tells its name from others. In the background, because bash answers signals only
# between commands: training gets them all, as the one by which it saves its state before it leaves, and nothing follows.
train() {
  local tag=$1 name code stopped= child= done_as complete command
  name=$(run_name "$2")
  shift 2
  command=$(deciding "${RECIPE[@]}" "$@")
  done_as=$NANOCHAT_BASE_DIR/runs/$tag/finished_as
  complete=$NANOCHAT_BASE_DIR/checkpoints/base/$tag/COMPLETE
  if [ -e "$complete" ]; then
    if [ "$(cat "$done_as" 2>/dev/null)" = "$command" ]; then
      echo "$tag: finished before"
      return
    fi
    echo "$tag: finished before, with other flags; trained again"
  fi
  rm -f "$done_as"
  trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' INT TERM HUP USR1
  NANOCHAT_RUN_ID=$tag "${LAUNCH[@]}" scripts.base_train --model-tag="$tag" --run="$name" "$@" "${RECIPE[@]}" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null || true # a signal came before its process was known
  while :; do # a signal ends `wait` before the child has ended
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  trap - INT TERM HUP USR1
  [ -z "$stopped" ] || exit 75 # call again to continue
  [ "$code" -eq 0 ] || exit "$code"
  # training that was told to stop by someone else saves, and ends with 0 as well
  if [ ! -e "$complete" ]; then
    echo "$tag: stopped before its last step; call again to continue" >&2
    exit 75
  fi
  mkdir -p "${done_as%/*}"
  echo "$command" >"$done_as"
}
