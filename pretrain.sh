#!/usr/bin/env bash
# Pretraining by size, on one GPU or many nodes:
#
#   bash pretrain.sh                             d20: text, tokenizer, base model, how good it is
#   bash pretrain.sh --depth=32                  or MODEL_DEPTH=32
#   bash pretrain.sh --depth=26 --posttrain      mid-training and SFT of a base model that is there
#   bash pretrain.sh --depth=26 --fullrun        both, and the report
#   bash pretrain.sh --shards=100 --mup --save-every=250     and any flag of base_train (python -m scripts.base_train --help)
#
# Several nodes: the same command on every node, as volc/, slurm/, sky/ and kubeflow/ do it (see `python -m nanochat.launch`). The
# store must be one folder that all nodes share, because all of them write the checkpoints. Node 0 alone walks through
# the stages and keeps the ledger; what runs as one process runs there. For what runs as one process a GPU it leaves
# word in the store, and the others join in (nanochat/cluster/nodes.py). Nobody waits for ever: each says every minute
# what it waits for, and ends WAIT_SECONDS after the last heartbeat of the other.
#
# Call it again to continue: stages that are done are skipped, training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/settings.sh
source dev/stages.sh
STOPPED_CODE=75 # what this script ends with after a signal, whatever torchrun made of it: call again to continue

# ---- Overrides: these and those of dev/settings.sh, in the environment as SHARDS=100 or as a flag, --shards=100

OVERRIDES="POSTTRAIN=0          1: mid-training and SFT of a base model that is there
FULLRUN=0            1: pretraining, mid-training and SFT, and the report
MAX_RESTARTS=0       times that torchrun starts training again after a process died
WAIT_SECONDS=900     after which other nodes take a silent node 0 for dead
$OVERRIDES"
take_settings "$@"
case $POSTTRAIN$FULLRUN in 00) WHAT=pretrain ;; 10) WHAT=posttrain ;; *) WHAT=fullrun ;; esac

# ---- Set-up, one node after the other where they share this folder. Then the profile's numbers.

if [ -w . ] && command -v flock >/dev/null; then
  exec 9>.setup.lock
  attend flock 9 || echo "this file system has no locks: on several nodes, set up each by \`bash dev/setup.sh\` before"
fi
source dev/setup.sh
exec 9>&-
if [ -n "$NPROC_PER_NODE" ]; then count_gpus; fi
source profiles/pretrain.sh
there=$(python -c 'import sys; from nanochat.data.sources import SOURCES
print(getattr(SOURCES.get(sys.argv[1]), "last", 10**9))' "$SOURCE") # train shards of a source that has numbered ones
if [ "$SHARDS" -gt "$there" ]; then
  echo "d$DEPTH asks for $SHARDS shards and $SOURCE has $there: text is repeated then (climbmix has the most)"
  SHARDS=$there
fi
PROFILE=pretrain
name_run

# ---- Where this runs

processes=${NPROC_PER_NODE:+--nproc-per-node="$NPROC_PER_NODE"}
cluster() { python -m nanochat.launch ${processes:+"$processes"} --show="$1"; }
NODES=$(cluster nodes)
if [ "$NODES" -gt 1 ] && [ -z "${NODES_FOLDER:-}" ]; then # node 0 calls this script again, the others follow it
  exec python -m nanochat.cluster.nodes "$NANOCHAT_BASE_DIR/runs/$TAG/nodes" --nodes="$NODES" \
    --node-rank="$(cluster node_rank)" --patience="$WAIT_SECONDS" -- bash pretrain.sh "$@"
fi
PROCESSES=$(cluster processes)

# With many GPUs, no more rows than the batch has for each of them.
most=$((TOTAL_BATCH_SIZE / 2048 / (NODES * PROCESSES)))
: "${DEVICE_BATCH_SIZE:=$((most >= 1 && most < ROWS ? most : ROWS))}"

# What starts a stage that runs as one process a GPU, on all nodes.
restarts=${MAX_RESTARTS#0} # 0: none
launch=(python -m nanochat.launch ${restarts:+--max-restarts="$restarts"} ${processes:+"$processes"} -- -m)

# ---- The stages, as dev/stages.sh writes them, and the report

walk() {
  if [ "$WHAT" != posttrain ]; then base_stages; fi
  if [ "$WHAT" != pretrain ]; then chat_stages; fi
  if [ "$WHAT" = fullrun ]; then skip_rl "speedrun.sh has it"; fi
}
base=$NANOCHAT_BASE_DIR/checkpoints/base/$TAG
[ "$WHAT" != posttrain ] || [ -e "$base/COMPLETE" ] ||
  stop "--posttrain: no finished base model in $base: train d$DEPTH first, or set RUN_ID"
check_stages
echo "$WHAT d$DEPTH: run $TAG, $NODES x $PROCESSES processes, $SHARDS shards of $SOURCE, $DEVICE_BATCH_SIZE rows a pass"
walk
if [ "$WHAT" = fullrun ]; then report; fi
