#!/usr/bin/env bash
# The table d12 ... d64 x GPUs x {ddp, fsdp, hsdp} x {Muon, AdamW}, for eight GPUs and more. One JSON file a run:
#
#   bash benchmarks/scale.sh                        this cluster, all rows; the same command on every node
#   DEPTHS="20 26" bash benchmarks/scale.sh         some rows
#   bash benchmarks/scale.sh --dry-run              the commands of the whole table
#   srun --ntasks-per-node=1 bash benchmarks/scale.sh        NNODES=4 bash volc/volc_submit.sh bash benchmarks/scale.sh
#
# Call it again to continue: rows with a result are skipped (on several nodes, from a folder that all of them share). A
# row that fails, as ddp will where weights do not fit, leaves its output as .log and does not stop the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEPTHS=${DEPTHS:-12 16 20 22 26 32 40 44 48 56 64}
STRATEGIES=${STRATEGIES:-ddp fsdp hsdp}
MUON=${MUON:-True False}
GPUS=${GPUS:-8 16 32 64 128} # of the dry run; otherwise those that are here
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TOTAL_BATCH=${TOTAL_BATCH:-524288} # tokens a step
LIMIT_SECONDS=${LIMIT_SECONDS:-1200} # for one row
RESULTS=${RESULTS:-benchmarks/results}

DRY_RUN=
case ${1:-} in
  "") ;;
  --dry-run) DRY_RUN=1 ;;
  *) echo "error: $1: expected nothing or --dry-run; DEPTHS, STRATEGIES, MUON and GPUS choose rows" >&2 && exit 2 ;;
esac

# Rows a pass on a GPU of 80 GB, as in pretrain.sh, and no more than the batch has for each.
rows() {
  local depth=$1 gpus=$2 rows=1 most
  if [ "$depth" -le 16 ]; then rows=32; elif [ "$depth" -le 22 ]; then rows=16; elif [ "$depth" -le 26 ]; then rows=8; fi
  if [ "$depth" -gt 26 ] && [ "$depth" -le 32 ]; then rows=4; fi
  most=$((TOTAL_BATCH / 2048 / gpus))
  echo $((most >= 1 && most < rows ? most : rows))
}

failed=()
run_row() {
  local depth=$1 gpus=$2 strategy=$3 muon=$4 optimizer=muon name
  if [ "$muon" = False ]; then optimizer=adamw; fi
  name=scale_d${depth}_${gpus}gpu_${strategy}_$optimizer
  local command=(python -m nanochat.launch -- -m benchmarks.parallel_speed --depth="$depth" --parallel="$strategy"
    --use-muon="$muon" --device-batch-size="$(rows "$depth" "$gpus")" --total-batch-size="$TOTAL_BATCH")
  if [ -n "$DRY_RUN" ]; then
    echo "$((gpus / GPUS_PER_NODE)) x $GPUS_PER_NODE GPUs: ${command[*]} > $RESULTS/$name.json"
    return
  fi
  if [ -s "$RESULTS/$name.json" ]; then
    echo "$name: done"
    return
  fi
  echo "=== $name: ${command[*]}"
  if ! timeout "$LIMIT_SECONDS" "${command[@]}" >"$RESULTS/$name.node$NODE_RANK.log" 2>&1; then
    failed+=("$name")
    tail -n 3 "$RESULTS/$name.node$NODE_RANK.log"
  elif [ "$NODE_RANK" = 0 ]; then # the process that prints runs here
    if grep '^{.*}$' "$RESULTS/$name.node0.log" | tail -n 1 >"$RESULTS/$name.tmp"; then
      mv "$RESULTS/$name.tmp" "$RESULTS/$name.json"
      cat "$RESULTS/$name.json"
    else
      failed+=("$name")
    fi
  fi
}

if [ -z "$DRY_RUN" ]; then
  source dev/setup.sh
  NODE_RANK=$(python -m nanochat.launch --show=node_rank)
  GPUS_PER_NODE=$(python -m nanochat.launch --show=processes)
  GPUS=$(($(python -m nanochat.launch --show=nodes) * GPUS_PER_NODE))
  mkdir -p "$RESULTS"
fi

for gpus in $GPUS; do
  for depth in $DEPTHS; do
    for strategy in $STRATEGIES; do
      if [ "$strategy" = hsdp ] && [ "$gpus" -le "$GPUS_PER_NODE" ]; then continue; fi # on one node it is fsdp
      for muon in $MUON; do run_row "$depth" "$gpus" "$strategy" "$muon"; done
    done
  done
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed, see their .log files in $RESULTS: ${failed[*]}" >&2
  exit 1
fi
