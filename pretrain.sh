#!/usr/bin/env bash
# Pretraining by size, on one GPU or many nodes:
#
#   bash pretrain.sh                             d20: text, tokenizer, base model, how good it is
#   bash pretrain.sh --depth=32                  or MODEL_DEPTH=32
#   bash pretrain.sh --depth=26 --posttrain      mid-training and SFT of a base model that is there
#   bash pretrain.sh --depth=26 --fullrun        both, and the report
#   bash pretrain.sh --shards=100 --device-batch-size=4 --save-every=250     these, and any flag of base_train
#
# Several nodes: the same command on every node, as volc/, slurm/ and sky/ do it (see `python -m nanochat.launch`). The
# store must be one folder that all nodes share, because all of them write the checkpoints. Node 0 alone walks through
# the stages and keeps the ledger; what runs as one process runs there. For what runs as one process a GPU it leaves
# word in the store, and the others join in (nanochat/cluster/nodes.py). Nobody waits for ever: each says every minute what it
# waits for, and ends WAIT_SECONDS after the last sign of life of the other.
#
# Call it again to continue: stages that are done are skipped, training goes on from its last checkpoint.
set -euo pipefail
shopt -s extglob
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---------------------------------------------------------------------------------------------------------------------
# Overrides: set any of these in the environment

OVERRIDES=(MODEL_DEPTH SOURCE VOCAB_SIZE SHARDS PARALLEL MAX_RESTARTS NPROC_PER_NODE WANDB_RUN RUN_ID EVAL_BUNDLE
  TASK_DATA WAIT_SECONDS NANOCHAT_BASE_DIR)
NANOCHAT_CONTINUE="bash pretrain.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
for name in "${OVERRIDES[@]}"; do
  if [ -n "${!name:-}" ]; then NANOCHAT_CONTINUE="$name=$(printf %q "${!name}") $NANOCHAT_CONTINUE"; fi
done
export NANOCHAT_CONTINUE # what a stage that fails tells you to type

DEPTH=${MODEL_DEPTH:-20}           # layers; the one dial of size (--depth)
SOURCE=${SOURCE:-fineweb-edu}      # text: fineweb-edu, climbmix, pydocs, local:DIR (--source)
VOCAB_SIZE=${VOCAB_SIZE:-65536}    # tokens in the vocabulary
SHARDS=${SHARDS:-}                 # train shards to download, about 100 MB each (--shards; default by depth)
PARALLEL=${PARALLEL:-auto}         # auto, ddp, fsdp, hsdp (--parallel)
MAX_RESTARTS=${MAX_RESTARTS:-0}    # times that torchrun starts training again after a process died
WANDB_RUN=${WANDB_RUN:-dummy}      # name of the run in Weights & Biases; dummy: none
RUN_ID=${RUN_ID:-}                 # name of this run's checkpoints, ledger and logs
EVAL_BUNDLE=${EVAL_BUNDLE:-}       # folder with a CORE bundle in the published layout; otherwise one is generated
TASK_DATA=${TASK_DATA:-}           # folder with chat data sets (gsm8k/, mmlu/, ...), not downloaded then
WAIT_SECONDS=${WAIT_SECONDS:-900}  # after which other nodes take a silent node 0 for dead
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat} # where all artifacts live

# ---------------------------------------------------------------------------------------------------------------------
# Set-up, one node after the other where they share this folder

if command -v flock >/dev/null; then
  {
    flock 9 || echo "this file system has no locks: on several nodes, set up each by \`bash dev/setup.sh\` before"
    source dev/setup.sh
  } 9>.setup.lock
else
  source dev/setup.sh
fi
source dev/stages.sh

# ---------------------------------------------------------------------------------------------------------------------
# What was asked for

WHAT=pretrain
DEVICE_BATCH=
TOTAL_BATCH=524288
EXTRA=() # flags handed on to base_train
while [ $# -gt 0 ]; do
  flag=$1
  shift
  case $flag in
    --posttrain | --fullrun) WHAT=${flag#--} && continue ;;
    --depth | --source | --shards | --parallel | --run | --model[-_]tag | --*[-_]batch[-_]size)
      [ $# -gt 0 ] || stop "$flag: expected a value after it"
      flag=$flag=$1
      shift
      ;;
  esac
  value=${flag#*=}
  case ${flag//_/-} in
    --depth=*) DEPTH=$value ;;
    --source=*) SOURCE=$value ;;
    --shards=*) SHARDS=$value ;;
    --parallel=*) PARALLEL=$value ;;
    --use-fsdp | --use-fsdp=[Tt]rue) PARALLEL=fsdp ;;
    --run=*) WANDB_RUN=$value ;;
    --model-tag=*) RUN_ID=$value ;;
    --device-batch-size=*) DEVICE_BATCH=$value ;;
    --total-batch-size=*) TOTAL_BATCH=$value ;;
    --*=* | --no-* | --compile) EXTRA+=("$flag") ;;
    *) stop "$flag: expected --depth=N, --posttrain, --fullrun, or a flag of scripts.base_train as --name=value" ;;
  esac
done
for name in DEPTH TOTAL_BATCH WAIT_SECONDS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name}: expected a whole number above 0"
done

# Shards of text for 20 tokens a parameter, and rows on a GPU of 80 GB. A depth between two rows takes the one above it:
# text enough, and memory that surely suffices. d12 and d16 were added by the rule of the others: 12 % more shards than
# 4.8 characters a token and 250 million characters a shard ask for, and the rows that d20 leaves room for.
TABLE="
  12   80 32
  16  150 32
  20  240 16
  22  300 16
  26  500  8
  32  800  4
  40 1500  1
  44 2000  1
  48 2500  1
  56 3500  1
  64 5000  1"
while read -r depth shards rows; do
  if [ -n "$depth" ] && { [ "$depth" -ge "$DEPTH" ] || [ "$depth" -eq 64 ]; }; then break; fi
done <<<"$TABLE"
: "${SHARDS:=$shards}"
if [ "$SOURCE" = fineweb-edu ] && [ "$SHARDS" -gt 1822 ]; then
  echo "d$DEPTH asks for $SHARDS shards and fineweb-edu has 1822: text is repeated then (SOURCE=climbmix has 6542)"
  SHARDS=1822
fi

# ---------------------------------------------------------------------------------------------------------------------
# Where this runs

cluster() {
  python -m nanochat.launch ${NPROC_PER_NODE:+--nproc-per-node="$NPROC_PER_NODE"} --show="$1"
}
NODES=$(cluster nodes)
NODE_RANK=$(cluster node_rank)
PROCESSES=$(cluster processes)

# With many GPUs, no more rows than the batch has for each of them.
if [ -z "$DEVICE_BATCH" ]; then
  most=$((TOTAL_BATCH / 2048 / (NODES * PROCESSES)))
  DEVICE_BATCH=$((most >= 1 && most < rows ? most : rows))
fi

if [[ $SOURCE == local:* ]]; then
  folder=$(cd "${SOURCE#local:}" 2>/dev/null && pwd -P) || stop "SOURCE=$SOURCE: no such folder"
  SOURCE=local:$folder
fi
DATA=base_data/$(slug "$SOURCE")
TAG=$(slug "${RUN_ID:-pretrain-d$DEPTH-$SOURCE}")
export NANOCHAT_RUN_ID=$TAG
export PROFILE=pretrain
CHECKPOINT=checkpoints/base/$TAG

# ---------------------------------------------------------------------------------------------------------------------
# Several nodes

if [ "$NODES" -gt 1 ]; then
  NODES_FOLDER=$NANOCHAT_BASE_DIR/runs/$TAG/nodes
  if [ "$NODE_RANK" -gt 0 ]; then
    exec python -m nanochat.cluster.nodes "$NODES_FOLDER" --node-rank="$NODE_RANK" --patience="$WAIT_SECONDS"
  fi
  NODES_ATTEMPT=$(date +%s)-$$-$RANDOM # an attempt of its own: the same job may have been here before
  export NODES_FOLDER NODES_ATTEMPT
  mkdir -p "$NODES_FOLDER"
  rm -f "$NODES_FOLDER"/joined-*
  tell() {
    echo "$2" >"$NODES_FOLDER/$1.tmp" && mv "$NODES_FOLDER/$1.tmp" "$NODES_FOLDER/$1"
  }
  (
    trap '' HUP INT TERM USR1 # it lives as long as this script, which may still have to save
    count=0
    while kill -0 $$ 2>/dev/null; do
      count=$((count + 1))
      tell beat "$NODES_ATTEMPT $count" || true
      sleep 2
    done
  ) >/dev/null &
  BEAT=$!
  disown "$BEAT" # bash need not report its end
  farewell() {
    local code=$?
    kill -KILL "$BEAT" 2>/dev/null || true
    tell end "$NODES_ATTEMPT $code"
    tell beat "$NODES_ATTEMPT last"
  }
  trap farewell EXIT

  # Nothing begins before all are here: a node that has another folder for its store would show only hours later.
  for ((waited = 0; ; waited++)); do
    missing=()
    for ((rank = 1; rank < NODES; rank++)); do
      [ -e "$NODES_FOLDER/joined-$NODES_ATTEMPT-$rank" ] || missing+=("$rank")
    done
    [ ${#missing[@]} -gt 0 ] || break
    if [ "$waited" -ge "$WAIT_SECONDS" ]; then
      stop "nodes ${missing[*]} of $NODES did not join in ${WAIT_SECONDS} s: see their logs, and check that" \
        "NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR is one shared folder on all nodes"
    fi
    [ $((waited % 60)) -ne 0 ] || echo "waiting for nodes ${missing[*]} of $NODES to join, in $NODES_FOLDER"
    sleep 1
  done
fi

# ---------------------------------------------------------------------------------------------------------------------
# How stages run

STOPPED_CODE=75 # what this script ends with after a signal, whatever torchrun made of it: call again to continue

# What starts a stage that runs as one process a GPU, on all nodes.
launch=(python -m nanochat.launch)
if [ "$MAX_RESTARTS" != 0 ]; then launch+=(--max-restarts="$MAX_RESTARTS"); fi
if [ -n "${NPROC_PER_NODE:-}" ]; then launch+=(--nproc-per-node="$NPROC_PER_NODE"); fi
launch+=(-- -m)

# ---------------------------------------------------------------------------------------------------------------------
# The stages. --in and --out name what each reads and writes, relative to the artifact store.

pretrain() {
  # Text. Of a large source, the first shards are enough for the tokenizer; the rest comes after it.
  local first=$((SHARDS < 8 ? SHARDS : 8)) first_data=$DATA count=() folder
  case $SOURCE in
    fineweb-edu | climbmix) first_data="$DATA/shard_0000[0-$((first - 1))].parquet" count=(-n "$first") ;;
    *) first=$SHARDS ;; # one piece
  esac
  stage dataset --out "$first_data" \
    -- python -m nanochat.dataset --source="$SOURCE" ${count[@]+"${count[@]}"}

  stage tok_train --in "$first_data" --out tokenizer \
    -- python -m scripts.tok_train --source="$SOURCE" --vocab-size="$VOCAB_SIZE" --max-chars=2e9
  stage tok_eval --in tokenizer -- python -m scripts.tok_eval --source="$SOURCE"

  if [ "$SHARDS" -gt "$first" ]; then
    stage dataset_rest --out "$DATA" -- python -m nanochat.dataset --source="$SOURCE" -n "$SHARDS"
  fi
  if [ -n "$EVAL_BUNDLE" ]; then
    folder=$(cd "$EVAL_BUNDLE" 2>/dev/null && pwd -P) || stop "EVAL_BUNDLE=$EVAL_BUNDLE: no such folder"
    stage eval_bundle --in "$folder" --out eval_bundle -- python -m scripts.make_eval_bundle --from-dir="$folder"
  else
    stage eval_bundle --in "$DATA" --out eval_bundle -- python -m scripts.make_eval_bundle --source="$SOURCE"
  fi

  stage base_train --in "$DATA" --in tokenizer --out "$CHECKPOINT" --out "$CHECKPOINT/COMPLETE" \
    -- "${launch[@]}" scripts.base_train --depth="$DEPTH" --source="$SOURCE" --model-tag="$TAG" --run="$WANDB_RUN" \
    --device-batch-size="$DEVICE_BATCH" --total-batch-size="$TOTAL_BATCH" --parallel="$PARALLEL" --resume=auto \
    ${EXTRA[@]+"${EXTRA[@]}"}
  stage base_loss --in "$DATA" --in "$CHECKPOINT" \
    -- "${launch[@]}" scripts.base_loss --model-tag="$TAG" --device-batch-size="$DEVICE_BATCH"
  stage base_eval --in eval_bundle --in "$CHECKPOINT" \
    -- "${launch[@]}" scripts.base_eval --model-tag="$TAG"
}

posttrain() {
  local tasks=SmolTalk,MMLU,GSM8K,ARC-Easy,ARC-Challenge,HumanEval,SimpleSpelling,SpellingBee,Identity
  local made from_dir=() chat_data=() task eval_tasks="ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee" folder=
  made=task_data/$(slug "$SOURCE")
  if [ ! -e "$NANOCHAT_BASE_DIR/$CHECKPOINT/COMPLETE" ]; then
    stop "--posttrain: no finished base model in $NANOCHAT_BASE_DIR/$CHECKPOINT: train d$DEPTH first, or set RUN_ID"
  fi
  if [ -n "$TASK_DATA" ]; then
    folder=$(cd "$TASK_DATA" 2>/dev/null && pwd -P) || stop "TASK_DATA=$TASK_DATA: no such folder"
    from_dir=(--from-dir="$folder")
  fi
  for task in SmolTalk MMLU GSM8K ARC-Easy ARC-Challenge; do chat_data+=(--in "task_data/hub/$task"); done
  chat_data+=(--in "$made/words.txt" --in "$made/words.json")
  stage chat_data --in "$DATA" ${folder:+--in "$folder"} --out task_data \
    -- python -m scripts.chat_data --source="$SOURCE" --tasks="$tasks" ${from_dir[@]+"${from_dir[@]}"}

  local mid=checkpoints/mid/$TAG sft=checkpoints/sft/$TAG
  stage mid_train --in "$CHECKPOINT" "${chat_data[@]}" --out "$mid" --out "$mid/COMPLETE" \
    -- "${launch[@]}" scripts.mid_train --model-tag="$TAG" --resume=auto --run="$WANDB_RUN"
  stage chat_eval_mid --in "$mid" "${chat_data[@]}" \
    -- "${launch[@]}" scripts.chat_eval -i mid -g "$TAG" -a "$eval_tasks"
  stage chat_sft --in "$mid" "${chat_data[@]}" --out "$sft" --out "$sft/COMPLETE" \
    -- "${launch[@]}" scripts.chat_sft --model-tag="$TAG" --total-batch-size=65536 --resume=auto --run="$WANDB_RUN"
  stage chat_eval_sft --in "$sft" "${chat_data[@]}" \
    -- "${launch[@]}" scripts.chat_eval -i sft -g "$TAG" -a "$eval_tasks"
}

echo "$WHAT d$DEPTH: run $TAG, $NODES x $PROCESSES processes, $SHARDS shards of $SOURCE, $DEVICE_BATCH rows a pass"
case $WHAT in
  pretrain) pretrain ;;
  posttrain) posttrain ;;
  fullrun)
    pretrain
    posttrain
    stage chat_rl --skip="speedrun.sh has it"
    stage chat_eval_rl --skip="speedrun.sh has it"
    python -m nanochat.report generate
    ;;
esac
