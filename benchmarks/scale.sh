#!/usr/bin/env bash
# The table of sizes x GPUs x {ddp, fsdp, hsdp} x variants of training. One JSON file a run:
#
#   bash benchmarks/scale.sh                        this cluster, all rows; the same command on every node
#   DEPTHS="20 26" bash benchmarks/scale.sh         some rows
#   for n in 1 2 4 8; do NPROC_PER_NODE=$n bash benchmarks/scale.sh; done    on one host, as it grows
#   bash benchmarks/scale.sh --dry-run              the commands of the whole table
#   srun --ntasks-per-node=1 bash benchmarks/scale.sh        NNODES=4 bash volc/volc_submit.sh bash benchmarks/scale.sh
#
# The device batch is what memory has room for. On one host hsdp takes two groups of its GPUs for two nodes.
# Call it again to continue: rows with a result are skipped (on several nodes, from a folder that all of them share). A
# row that fails, as ddp will where weights do not fit, leaves its output as .log and does not stop the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEPTHS=${DEPTHS:-12 16 20 22 26 32 40 44 48 56 64}
STRATEGIES=${STRATEGIES:-ddp fsdp hsdp}
VARIANTS=${VARIANTS:-classic fp8 ngram ngram_fp8} # also: adamw
GPUS=${GPUS:-1 2 4 8 16 32 64 128} # of the dry run; otherwise those that are here
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
  *) echo "error: $1: expected nothing or --dry-run; DEPTHS, STRATEGIES, VARIANTS and GPUS choose rows" >&2 && exit 2 ;;
esac

failed=()
run_row() { # DEPTH GPUS STRATEGY VARIANT
  local depth=$1 gpus=$2 name=scale_d$1_$2gpu_$3_$4 local_gpus=$GPUS_PER_NODE command
  if [ "$gpus" -lt "$GPUS_PER_NODE" ]; then local_gpus=$gpus; fi
  command=(python -m nanochat.launch -- -m benchmarks.train_speed --depth="$depth" --parallel="$3"
    --device-batch-size=0 --total-batch-size="$TOTAL_BATCH" --vocab-size=32768)
  case $4 in adamw) command+=(--use-muon=False) ;; ngram*) command+=(--arch=ngram --ngram-slots=2) ;; esac
  case $4 in *fp8) command+=(--fp8=all) ;; esac
  if [ "$3" = hsdp ] && [ "$gpus" -le "$GPUS_PER_NODE" ]; then command+=(--node-size=$((gpus / 2))); fi
  command+=(--out="$RESULTS/$name.json")
  if [ -n "$DRY_RUN" ]; then
    echo "$((gpus / local_gpus)) x $local_gpus GPUs: ${command[*]}"
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
      if [ "$gpus" = 1 ] && [ "$strategy" != ddp ]; then continue; fi # one GPU shares with nobody
      for variant in $VARIANTS; do run_row "$depth" "$gpus" "$strategy" "$variant"; done
    done
  done
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed, see their .log files in $RESULTS: ${failed[*]}" >&2
  exit 1
fi
