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

case ${1:-} in
  --dry-run) DRY_RUN=1 ;;
  "")
    DRY_RUN=
    source dev/setup.sh
    NODE_RANK=$(python -m nanochat.launch --show=node_rank)
    GPUS_PER_NODE=$(python -m nanochat.launch --show=processes)
    GPUS=$(($(python -m nanochat.launch --show=nodes) * GPUS_PER_NODE))
    mkdir -p "$RESULTS"
    ;;
  *) echo "error: $1: expected nothing or --dry-run; DEPTHS, STRATEGIES, MUON and GPUS choose rows" >&2 && exit 2 ;;
esac

failed=()
run_row() { # DEPTH GPUS STRATEGY USE_MUON
  local depth=$1 gpus=$2 name rows most=$((TOTAL_BATCH / 2048 / $2)) command
  rows=$(DEPTH=$depth && source profiles/pretrain.sh && echo "$ROWS") # but no more than the batch has for each GPU
  if [ "$most" -ge 1 ] && [ "$most" -lt "$rows" ]; then rows=$most; fi
  name=scale_d${depth}_${gpus}gpu_$3_$([ "$4" = True ] && echo muon || echo adamw)
  command=(python -m nanochat.launch -- -m benchmarks.train_speed --depth="$depth" --parallel="$3" --use-muon="$4"
    --device-batch-size="$rows" --total-batch-size="$TOTAL_BATCH" --out="$RESULTS/$name.json")
  if [ -n "$DRY_RUN" ]; then
    echo "$((gpus / GPUS_PER_NODE)) x $GPUS_PER_NODE GPUs: ${command[*]}"
  elif [ -s "$RESULTS/$name.json" ]; then
    echo "$name: done"
  else
    echo "=== $name: ${command[*]}"
    timeout "$LIMIT_SECONDS" "${command[@]}" >"$RESULTS/$name.node$NODE_RANK.log" 2>&1 || failed+=("$name")
    tail -n 20 "$RESULTS/$name.node$NODE_RANK.log"
  fi
}

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
