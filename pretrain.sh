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
# word in the store, and the others join in (nanochat/cluster/nodes.py). Nobody waits for ever: each says every minute
# what it waits for, and ends WAIT_SECONDS after the last heartbeat of the other.
#
# Call it again to continue: stages that are done are skipped, training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/stages.sh

# ---- Overrides: set any of these in the environment, or use the flag

remember_command "bash pretrain.sh$([ $# -eq 0 ] || printf ' %q' "$@")" MODEL_DEPTH SOURCE VOCAB_SIZE SHARDS PARALLEL \
  MAX_RESTARTS NPROC_PER_NODE WANDB_RUN RUN_ID EVAL_BUNDLE TASK_DATA WAIT_SECONDS NANOCHAT_BASE_DIR

DEPTH=${MODEL_DEPTH:-20}           # layers; the one dial of size (--depth)
SHARDS=${SHARDS:-}                 # train shards to download, about 100 MB each (--shards; default by depth)
PARALLEL=${PARALLEL:-auto}         # auto, ddp, fsdp, hsdp (--parallel)
MAX_RESTARTS=${MAX_RESTARTS:-0}    # times that torchrun starts training again after a process died
WAIT_SECONDS=${WAIT_SECONDS:-900}  # after which other nodes take a silent node 0 for dead
SOURCE=${SOURCE:-} VOCAB_SIZE=${VOCAB_SIZE:-} NPROC_PER_NODE=${NPROC_PER_NODE:-} # these as in speedrun.sh
WANDB_RUN=${WANDB_RUN:-dummy} RUN_ID=${RUN_ID:-} EVAL_BUNDLE=${EVAL_BUNDLE:-} TASK_DATA=${TASK_DATA:-}
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}

WHAT=pretrain DEVICE_BATCH='' TOTAL_BATCH=524288
EXTRA=() # flags handed on to base_train

read_flags() {
  local flag value
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
}

# ---- Set-up, one node after the other where they share this folder. Then the profile's numbers.

if command -v flock >/dev/null; then
  {
    flock 9 || echo "this file system has no locks: on several nodes, set up each by \`bash dev/setup.sh\` before"
    source dev/setup.sh
  } 9>.setup.lock
else
  source dev/setup.sh
fi
read_flags "$@"
for name in DEPTH TOTAL_BATCH WAIT_SECONDS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name}: expected a whole number above 0"
done
source profiles/pretrain.sh
there=$(python -c 'import sys; from nanochat.data.sources import SOURCES
print(getattr(SOURCES.get(sys.argv[1]), "last", ""))' "$SOURCE") # train shards of a source that has numbered ones
if [ -n "$there" ] && [ "$SHARDS" -gt "$there" ]; then
  echo "d$DEPTH asks for $SHARDS shards and $SOURCE has $there: text is repeated then (climbmix has the most)"
  SHARDS=$there
fi
PROFILE=pretrain
name_run

# ---- Where this runs

cluster() {
  python -m nanochat.launch ${NPROC_PER_NODE:+--nproc-per-node="$NPROC_PER_NODE"} --show="$1"
}
NODES=$(cluster nodes)
if [ "$NODES" -gt 1 ] && [ -z "${NODES_FOLDER:-}" ]; then # node 0 calls this script again, the others follow it
  exec python -m nanochat.cluster.nodes "$NANOCHAT_BASE_DIR/runs/$TAG/nodes" --nodes="$NODES" \
    --node-rank="$(cluster node_rank)" --patience="$WAIT_SECONDS" -- bash pretrain.sh "$@"
fi
PROCESSES=$(cluster processes)

# With many GPUs, no more rows than the batch has for each of them.
if [ -z "$DEVICE_BATCH" ]; then
  most=$((TOTAL_BATCH / 2048 / (NODES * PROCESSES)))
  DEVICE_BATCH=$((most >= 1 && most < ROWS ? most : ROWS))
fi
BASE_TRAIN=(--device-batch-size="$DEVICE_BATCH" --total-batch-size="$TOTAL_BATCH" --parallel="$PARALLEL"
  ${EXTRA[@]+"${EXTRA[@]}"})
BASE_LOSS+=(--device-batch-size="$DEVICE_BATCH")

# What starts a stage that runs as one process a GPU, on all nodes.
launch=(python -m nanochat.launch)
if [ "$MAX_RESTARTS" != 0 ]; then launch+=(--max-restarts="$MAX_RESTARTS"); fi
if [ -n "$NPROC_PER_NODE" ]; then launch+=(--nproc-per-node="$NPROC_PER_NODE"); fi
launch+=(-- -m)

STOPPED_CODE=75 # what this script ends with after a signal, whatever torchrun made of it: call again to continue

# ---- The stages, as dev/stages.sh writes them

echo "$WHAT d$DEPTH: run $TAG, $NODES x $PROCESSES processes, $SHARDS shards of $SOURCE, $DEVICE_BATCH rows a pass"
if [ "$WHAT" != posttrain ]; then base_stages; fi
if [ "$WHAT" != pretrain ]; then
  if [ ! -e "$NANOCHAT_BASE_DIR/checkpoints/base/$TAG/COMPLETE" ]; then
    stop "--posttrain: no finished base model in $NANOCHAT_BASE_DIR/checkpoints/base/$TAG: train d$DEPTH first, or" \
      "set RUN_ID"
  fi
  chat_stages
fi
if [ "$WHAT" = fullrun ]; then
  skip_rl "speedrun.sh has it"
  python -m nanochat.report generate
fi
