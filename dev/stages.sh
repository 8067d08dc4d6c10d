# The chain of stages, each written once. speedrun.sh and pretrain.sh source this, set what differs (a file of profiles/,
# and the settings of the caller), and walk the chain. nanochat/ledger.py says what each stage builds on.
set -euo pipefail

# ---- Signals

STOPPED= # the first that came
RUNNING= # process that is told of them
for name in INT TERM HUP QUIT USR1; do trap "on_signal $name" "$name"; done

# Where something runs that is not told (it takes seconds), bash comes here after its end.
on_signal() {
  STOPPED=${STOPPED:-$1}
  if [ -z "$RUNNING" ]; then leave 0; fi
  kill -TERM "$RUNNING" 2>/dev/null || true
}

# leave CODE: ends the script after a signal; CODE: of what was told of it, which has said how to continue. After a
# scheduler's signal with STOPPED_CODE, where that is set.
leave() {
  local code=$1
  case $code in 0 | 143) code=$((128 + $(kill -l "$STOPPED"))) ;; esac
  [ "$1" -ne 0 ] || printf '\nstopped by SIG%s\nto continue: %s\n' "$STOPPED" "${NANOCHAT_CONTINUE:-bash ${0##*/}}" >&2
  case $STOPPED in TERM | HUP | USR1) code=${STOPPED_CODE:-$code} ;; esac
  exit "$code"
}

# attend COMMAND...: runs it in the background, because bash answers signals only between commands; it is told TERM for
# whichever comes, also one to this shell alone. After a signal the script ends when the command has.
attend() {
  local code
  "$@" &
  RUNNING=$!
  [ -z "$STOPPED" ] || kill -TERM "$RUNNING" 2>/dev/null || true
  # a signal ends `wait` before the command has ended
  while code=0 && { wait "$RUNNING" || code=$?; } && kill -0 "$RUNNING" 2>/dev/null; do :; done
  RUNNING=
  if [ -n "$STOPPED" ]; then leave "$code"; fi
  return "$code"
}

# What the run and its folders are called, from PROFILE, DEPTH, SOURCE and RUN_ID.
name_run() {
  local names
  names=$(python -c 'import sys; from nanochat.paths import slug; print(*map(slug, sys.argv[1:]))' \
    "$SOURCE" "${RUN_ID:-$PROFILE-d$DEPTH-$SOURCE}")
  DATA=base_data/${names% *} TAG=${names#* }
  export PROFILE NANOCHAT_RUN_ID=$TAG
}

# ---- The chain. --in and --out name what each stage reads and writes, relative to the artifact store; `launch` starts
# what runs as one process a GPU.

base_stages() {
  local first_data=$DATA first=$SHARDS count='' folder=''

  # Text. Of a large source, the first shards are enough for the tokenizer; the rest comes after it. What is made on
  # this machine is one piece; every other source in nanochat.dataset.SOURCES is a repository of numbered shards.
  case $SOURCE in
    pydocs) ;;
    local:*) folder=$SOURCE ;;
    *)
      first=$((SHARDS < 8 ? SHARDS : 8))
      first_data="$DATA/shard_0000[0-$((first - 1))].parquet" count=$first
      ;;
  esac
  stage dataset ${folder:+--in "$folder"} --out "$first_data" \
    -- python -m nanochat.dataset --source="$SOURCE" ${count:+-n "$count"}
  hold_text

  # Tokenizer
  stage tok_train --in "$first_data" --out tokenizer \
    -- python -m scripts.tok_train --source="$SOURCE" --vocab-size="$VOCAB_SIZE" "${TOK_TRAIN[@]}"
  stage tok_eval --in tokenizer --in "$first_data" -- python -m scripts.tok_eval --source="$SOURCE"

  # The rest of the text, and the evaluation tasks
  [ "$SHARDS" -le "$first" ] || stage dataset_rest --out "$DATA" -- python -m nanochat.dataset --source="$SOURCE" -n "$SHARDS"
  local from=${EVAL_BUNDLE:+--from-dir="$EVAL_BUNDLE"}
  stage eval_bundle --in "${EVAL_BUNDLE:-$DATA}" --out eval_bundle \
    -- python -m scripts.make_eval_bundle "${from:---source="$SOURCE"}"

  # Pretraining, and how good it is
  local model=checkpoints/base/$TAG rows=${DEVICE_BATCH_SIZE:+--device-batch-size="$DEVICE_BATCH_SIZE"}
  base_train_flags
  stage base_train --in "$DATA" --in tokenizer --out "$model" --out "$model/COMPLETE" \
    -- "${launch[@]}" scripts.base_train --depth="$DEPTH" --source="$SOURCE" --model-tag="$TAG" --resume=auto \
    --run="$WANDB_RUN" ${rows:+"$rows"} ${FLAGS[@]+"${FLAGS[@]}"}
  stage base_loss --in "$DATA" --in "$model" \
    -- "${launch[@]}" scripts.base_loss --model-tag="$TAG" ${rows:+"$rows"} ${BASE_LOSS[@]+"${BASE_LOSS[@]}"}
  stage base_eval --in eval_bundle --in "$model" \
    -- "${launch[@]}" scripts.base_eval --model-tag="$TAG" ${BASE_EVAL[@]+"${BASE_EVAL[@]}"}
}

# FLAGS of base_train: those of the user, and of the profile's those that they leave standing.
base_train_flags() {
  local word flag
  FLAGS=()
  for word in ${BASE_TRAIN[@]+"${BASE_TRAIN[@]}"}; do
    for flag in ${EXTRA[@]+"${EXTRA[@]//_/-}"}; do
      case ${flag%%=*} in "${word%%=*}") continue 2 ;; esac
      case $word$flag in --num-iterations=*--iterations* | --num-iterations=*--target-*) continue 2 ;; esac # another horizon
    done
    FLAGS+=("$word")
  done
  FLAGS+=(${TOTAL_BATCH_SIZE:+--total-batch-size="$TOTAL_BATCH_SIZE"} ${PARALLEL:+--parallel="$PARALLEL"}
    ${EXTRA[@]+"${EXTRA[@]}"})
}

chat_stages() {
  local inputs=unknown path
  hold_text
  # Conversations: data sets from TASK_DATA or the hub, and what is made from the run's own text
  stage chat_data --in "$DATA" ${TASK_DATA:+--in "$TASK_DATA"} --out task_data \
    -- python -m scripts.chat_data --source="$SOURCE" --tasks="$TASKS" ${TASK_DATA:+--from-dir="$TASK_DATA"}

  # What the tasks read, and no more: data that another run gets later must not train this one anew.
  [ -n "${CHECKING:-}" ] || inputs=$(python -m scripts.chat_data --source="$SOURCE" --tasks="$TASKS" --print-inputs)
  CHAT_DATA=()
  while read -r path; do CHAT_DATA+=(--in "$path"); done <<<"$inputs"

  chat_stage mid_train base mid ${MID[@]+"${MID[@]}"} # the base model meets conversations
  chat_stage chat_sft mid sft ${SFT[@]+"${SFT[@]}"}   # it learns to answer
}

rl_stages() {
  chat_stage chat_rl sft rl "${RL[@]}" # it practises on questions that can be graded
}

skip_rl() {
  for name in chat_rl chat_eval_rl; do stage "$name" --skip="$1"; done
}

# chat_stage NAME FROM TO FLAG...: training on conversations makes model TO (mid, sft, rl) of model FROM, which is graded.
chat_stage() {
  local from=checkpoints/$2/$TAG to=checkpoints/$3/$TAG
  stage "$1" --in "$from" "${CHAT_DATA[@]}" --out "$to" --out "$to/COMPLETE" \
    -- "${launch[@]}" "scripts.$1" --model-tag="$TAG" --resume=auto --run="$WANDB_RUN" "${@:4}"
  stage "chat_eval_$3" --in "$to" "${CHAT_DATA[@]}" -- "${launch[@]}" scripts.chat_eval -i "$3" -g "$TAG" "${CHAT_EVAL[@]}"
}

# The run is ours from the first stage to the end of this script: the runner of each stage locks what we have open.
hold_run() {
  local folder=$NANOCHAT_BASE_DIR/runs/$TAG
  mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || return 0 # where it cannot be, the runner says why
  exec 8>>"$folder/lock"
  export RUN_LOCK=8 CHAIN_PID=$$
}

# Walks the chain of the caller without running it, and has all flags checked before the first stage begins.
check_stages() {
  (
    stage() { printf '%s\0' "$@" ''; }
    CHECKING=1 && walk
  ) | python -m nanochat.pipeline check -- ${WRITTEN[@]+"${WRITTEN[@]}"}
}

# From here on no other run may replace the text that this one reads.
hold_text() {
  [ -d "$NANOCHAT_BASE_DIR/$DATA" ] || return 0
  exec 7<"$NANOCHAT_BASE_DIR/$DATA"
  export TEXT_LOCK=7
}

report() { attend python -m nanochat.report generate ${USD_PER_HOUR:+--usd-per-hour="$USD_PER_HOUR"}; }

# Runs one stage unless it is done (see nanochat/pipeline.py).
stage() {
  [ -n "${RUN_LOCK:-}" ] || hold_run
  attend runner "$@" || exit $?
}

# Slurm sends USR1 to all of us at once; the runner does not know it, so it is kept from it and told TERM.
runner() {
  trap '' USR1
  exec python -m nanochat.pipeline run "$@"
}
