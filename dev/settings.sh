# What the user sets, by environment or by flag: read, and checked before anything is installed, fetched or trained.
# speedrun.sh and pretrain.sh source this. The flags of the stages are checked by check_stages of dev/stages.sh.
set -euo pipefail
unset CDPATH # with it `cd` prints, and may go elsewhere
[ -n "${HOME:-}" ] || { unset HOME && export HOME=~; } # without HOME, ~ is what the system knows

# Name, default (none: by depth or profile) and meaning of what both scripts take; each adds its own.
OVERRIDES="DEPTH                layers; the one dial of size: width, heads and horizon follow from it
SOURCE               text: pydocs, fineweb-edu, climbmix, local:DIR (parquet, jsonl, txt)
VOCAB_SIZE           tokens in the vocabulary
SHARDS               train shards to download, about 100 MB each (hub sources only)
DEVICE_BATCH_SIZE    rows a pass on each device; lower it when memory runs out
TOTAL_BATCH_SIZE     tokens of an optimizer step
PARALLEL             auto, ddp, fsdp, hsdp
NPROC_PER_NODE       processes, one a GPU (default: all GPUs in full and pretrain, otherwise 1)
WANDB_RUN=dummy      name of the run in Weights & Biases (also --run); dummy: none
RUN_ID               name of the run (also --model-tag): of its checkpoints, and its folder below runs/
EVAL_BUNDLE          folder with a CORE bundle in the published layout; otherwise one is generated
TASK_DATA            folder with chat data sets (gsm8k/, mmlu/, ...), which are not downloaded then; not for tiny
USD_PER_HOUR         price of the machine, for what the run has cost in the report; otherwise that is left out
NANOCHAT_BASE_DIR=~/.cache/nanochat   where all artifacts live"
SETTINGS=() # their names
EXTRA=()    # flags handed on to base_train
WRITTEN=()  # all that the user set, as he wrote it: DEPTH=8, --depth=8, --mup

stop() { echo "error: ${*//$'\n'/ }" >&2 && exit 1; }

# take_settings FLAG...: sets all that OVERRIDES names, and NANOCHAT_CONTINUE, which a stage that fails tells you to type.
take_settings() {
  local name default flag
  NANOCHAT_CONTINUE="bash ${0##*/}$([ $# -eq 0 ] || printf ' %q' "$@")"
  if [ -n "${MODEL_DEPTH:-}" ]; then DEPTH=$MODEL_DEPTH FLAG_DEPTH=MODEL_DEPTH=$MODEL_DEPTH; fi
  while read -r name _; do
    IFS== read -r name default <<<"$name"
    SETTINGS+=("$name")
    if [ -n "${!name:-}" ]; then
      NANOCHAT_CONTINUE="$name=$(printf %q "${!name}") $NANOCHAT_CONTINUE"
      flag=FLAG_$name
      WRITTEN+=("${!flag:-$name=${!name}}")
    else
      printf -v "$name" %s "$default"
    fi
  done <<<"$OVERRIDES"
  read_flags "$@"
  check_settings
  NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR/#~\//$HOME/}
  export NANOCHAT_CONTINUE NANOCHAT_BASE_DIR
}

# read_flags FLAG...: --vocab-size=512 or --vocab-size 512 is VOCAB_SIZE, and so for all settings; the others are flags
# of base_train.
read_flags() {
  local word name known
  shopt -s nocasematch
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --use[-_]fsdp | --use[-_]fsdp=true) set -- --parallel=fsdp "${@:2}" ;;
      --run[-_]rl | --posttrain | --fullrun) set -- "$1=1" "${@:2}" ;; # these need no value
      --[a-z]*) ;;
      *) stop "$1: expected flags such as --depth=8 (see --help)" ;;
    esac
    word=$1 name=${1%%=*}
    shift
    if [[ $word != *=* && ${1:--x} != -[a-z-]* ]]; then word=$word=$1 && shift; fi
    name=${name#--} name=${name//-/_}
    case $name in run) name=WANDB_RUN ;; model_tag) name=RUN_ID ;; esac
    for known in "${SETTINGS[@]}" ''; do [[ $known != "$name" ]] || break; done
    if [ -z "$known" ]; then
      EXTRA+=("$word")
    elif [[ $word != *=?* ]]; then
      stop "$word: expected a value after it"
    else
      printf -v "$known" %s "${word#*=}"
      printf -v "FLAG_$known" %s "$word"
    fi
    WRITTEN+=("$word")
  done
  shopt -u nocasematch
}

# The comment at the head of the script, and its settings.
usage() {
  sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "${0##*/}"
  printf '\nOverrides, in the environment as DEPTH=8 or as a flag, --depth=8:\n%s\n' "$OVERRIDES"
}

# refuse NAME WHY: names the setting as the user wrote it.
refuse() {
  local flag=FLAG_$1
  stop "${!flag:-$1=${!1}}: $2"
}

# expect PATTERN TEXT NAME...: of those that this script takes, the ones that are set must be of this form.
expect() {
  local name
  for name in "${@:3}"; do
    [[ " ${SETTINGS[*]} NANOCHAT_DTYPE " != *" $name "* || -z ${!name:-} || ${!name} =~ ^($1)$ ]] ||
      refuse "$name" "expected $2"
  done
}

# Makes the folder that a setting names (DIR or local:DIR) a full path.
find_folder() {
  local folder=${!1#local:}
  local kind=${!1%"$folder"}
  folder=${folder/#~\//$HOME/}
  [ -n "$folder" ] || refuse "$1" "expected a folder, as in local:/my/text"
  [[ $folder == /* ]] || folder=./$folder
  [ ! -f "$folder" ] || refuse "$1" "a file: name the folder that it is in"
  [ -d "$folder" ] || refuse "$1" "no such folder"
  folder=$(cd "$folder" 2>/dev/null && pwd -P) || refuse "$1" "this folder may not be read"
  printf -v "$1" %s "$kind$folder"
}

# What needs nothing but bash.
check_settings() {
  local name
  expect '[1-9][0-9]{0,8}' "a whole number above 0" DEPTH VOCAB_SIZE SHARDS NPROC_PER_NODE DEVICE_BATCH_SIZE \
    TOTAL_BATCH_SIZE WAIT_SECONDS
  expect '0|[1-9][0-9]{0,8}' "a whole number" MAX_RESTARTS
  expect '[0-9]{1,6}([.][0-9]{1,4})?' "a price such as 24 or 2.50" USD_PER_HOUR
  expect '0|1' "0 or 1" RUN_RL POSTTRAIN FULLRUN
  expect 'auto|tiny|mini|full' "auto, tiny, mini or full" PROFILE
  expect 'auto|ddp|fsdp|hsdp' "auto, ddp, fsdp or hsdp" PARALLEL
  expect 'bfloat16|float32' "bfloat16 or float32" NANOCHAT_DTYPE
  if [ -z "${NANOCHAT_DTYPE:-}" ]; then unset NANOCHAT_DTYPE; fi
  if [[ $SOURCE == local:* ]]; then find_folder SOURCE; fi
  for name in EVAL_BUNDLE TASK_DATA; do [ -z "${!name}" ] || find_folder "$name"; done
}

# How many GPUs there are: no fewer than processes, where there are any.
count_gpus() {
  GPUS=$(python -c 'from nanochat.launch import visible_gpus; print(visible_gpus())')
  [ "$GPUS" -eq 0 ] || [ "${NPROC_PER_NODE:-1}" -le "$GPUS" ] ||
    refuse NPROC_PER_NODE "PyTorch sees $GPUS GPUs here, and each process needs one"
}
