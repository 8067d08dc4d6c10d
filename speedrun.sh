#!/usr/bin/env bash
# Raw text to a model that chats, and a report of how good it is:
#
#   bash speedrun.sh                 tiny without a GPU, full with one
#   RUN_RL=1 bash speedrun.sh        reinforcement learning too
#   PROFILE=mini SOURCE=local:/my/text TASK_DATA=/my/tasks bash speedrun.sh
#
# TASK_DATA is for mini and full: no task of tiny comes from there.
# Call it again to continue: stages that are done are skipped, training goes on from its last checkpoint.
set -euo pipefail
shopt -s extglob
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---------------------------------------------------------------------------------------------------------------------
# Overrides: set any of these in the environment

OVERRIDES=(PROFILE DEPTH SOURCE VOCAB_SIZE SHARDS NPROC_PER_NODE WANDB_RUN RUN_ID EVAL_BUNDLE TASK_DATA
  RUN_RL NANOCHAT_BASE_DIR)
NANOCHAT_CONTINUE="bash speedrun.sh"
for name in "${OVERRIDES[@]}"; do
  if [ -n "${!name:-}" ]; then NANOCHAT_CONTINUE="$name=$(printf %q "${!name}") $NANOCHAT_CONTINUE"; fi
done
export NANOCHAT_CONTINUE # what a stage that fails tells you to type

PROFILE=${PROFILE:-auto}             # auto, tiny (2 CPU cores, no network), mini (one GPU, minutes), full (GPUs, hours)
DEPTH=${DEPTH:-}                     # layers; the one dial of size: width, heads and horizon follow from it
SOURCE=${SOURCE:-}                   # text: pydocs, fineweb-edu, climbmix, local:DIR (parquet, jsonl, txt)
VOCAB_SIZE=${VOCAB_SIZE:-}           # tokens in the vocabulary
SHARDS=${SHARDS:-}                   # train shards to download, about 100 MB each (hub sources only)
NPROC_PER_NODE=${NPROC_PER_NODE:-}   # processes, one a GPU (default: all GPUs in full, otherwise 1)
WANDB_RUN=${WANDB_RUN:-dummy}        # name of the run in Weights & Biases; dummy: none
RUN_ID=${RUN_ID:-}                   # folder of this run's ledger, logs and report below runs/
EVAL_BUNDLE=${EVAL_BUNDLE:-}         # folder with a CORE bundle in the published layout; otherwise one is generated
TASK_DATA=${TASK_DATA:-}             # mini, full: folder with chat data sets (gsm8k/, mmlu/, ...), not downloaded then
RUN_RL=${RUN_RL:-0}                  # 1: reinforcement learning after SFT
export NANOCHAT_BASE_DIR=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat} # where all artifacts live

# ---------------------------------------------------------------------------------------------------------------------
# Set-up: uv, .venv, locked dependencies, the Rust tokenizer; nothing to do the second time

source dev/setup.sh
source dev/stages.sh

# ---------------------------------------------------------------------------------------------------------------------
# Profiles: all numbers that differ between them

GPUS=0 # those that PyTorch can use; asked only where there is a driver, because the question takes seconds
if nvidia-smi --list-gpus >/dev/null 2>&1; then GPUS=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
if [ "$PROFILE" = auto ]; then
  if [ "$GPUS" -gt 0 ]; then PROFILE=full; else PROFILE=tiny; fi
fi
export PROFILE

case $RUN_RL in 0 | 1) ;; *) stop "RUN_RL=$RUN_RL: expected 0 or 1" ;; esac
case $PROFILE in
  tiny) # the whole chain on 2 CPU cores, without network
    : "${DEPTH:=4}" "${SOURCE:=pydocs}" "${VOCAB_SIZE:=4096}" "${NPROC_PER_NODE:=1}" "${SHARDS:=1}"
    TOK_TRAIN=(--max-chars=2e7)
    BASE_TRAIN=(--head-dim=64 --max-seq-len=256 --device-batch-size=16 --total-batch-size=8192 --num-iterations=150
      --eval-every=50 --eval-tokens=131072 --core-metric-every=-1 --sample-every=-1 --save-every=50)
    # processors that multiply bf16 natively train twice as fast in it (9,000 against 4,300 tokens/s on two cores)
    if [ -r /proc/cpuinfo ] && [[ $(</proc/cpuinfo) =~ avx512_bf16|amx_bf16 ]]; then
      export NANOCHAT_DTYPE=${NANOCHAT_DTYPE:-bfloat16}
    fi
    BASE_LOSS=(--device-batch-size=16 --split-tokens=131072)
    BASE_EVAL=(--max-per-task=100)
    TASK_DATA= # no task below comes from there
    # few worked arithmetic problems, so that reinforcement learning, which sees many more without answers, has a point
    TASKS=SimpleSpelling,SpellingBee,Arithmetic,TextChoice,Identity
    MID=(--tasks=Arithmetic:300,SimpleSpelling:4000,SpellingBee:500,TextChoice:1000,Identity*2
      --num-iterations=70 --eval-every=-1 --eval-tokens=65536 --save-every=50)
    SFT=(--tasks=Arithmetic:1000,SimpleSpelling:8000,SpellingBee:5000,TextChoice:1000,Identity
      --num-iterations=100 --init-lr-frac=1 --eval-every=-1 --eval-tokens=65536 --save-every=50)
    CHAT_EVAL=(-a Arithmetic,SimpleSpelling,SpellingBee,TextChoice -m 96 -b 64)
    RL=(--task=Arithmetic --num-iterations=30 --num-samples=8 --device-batch-size=32 --max-new-tokens=48
      --init-lr-frac=0.15 --eval-every=-1 --eval-questions=128 --eval-samples=4 --save-every=-1)
    ;;
  mini) # one GPU, about ten minutes with reinforcement learning
    : "${DEPTH:=12}" "${SOURCE:=pydocs}" "${VOCAB_SIZE:=32768}" "${NPROC_PER_NODE:=1}" "${SHARDS:=4}"
    TOK_TRAIN=(--max-chars=2e8)
    BASE_TRAIN=(--total-batch-size=65536 --num-iterations=600 --eval-every=300 --eval-tokens=2097152
      --core-metric-every=-1 --sample-every=-1)
    BASE_LOSS=(--split-tokens=2097152)
    BASE_EVAL=(--max-per-task=300)
    TASKS=SimpleSpelling,SpellingBee,Arithmetic,TextChoice,Identity
    RL=(--task=Arithmetic)
    if [ -n "$TASK_DATA" ]; then
      TASKS=GSM8K,$TASKS
      RL=(--task=GSM8K)
    fi
    MID=(--tasks="${TASKS/GSM8K/GSM8K*2}" --num-iterations=100 --eval-every=-1 --eval-tokens=1048576
      --save-every=-1)
    SFT=(--tasks="${TASKS/GSM8K/GSM8K*2}" --num-iterations=60 --eval-every=-1 --eval-tokens=1048576
      --save-every=-1)
    CHAT_EVAL=(-a "${TASKS%,Identity}" -x 256 -m 200 -b 128)
    RL+=(--num-iterations=20 --device-batch-size=64 --max-new-tokens=200 --init-lr-frac=0.1 --eval-every=-1
      --eval-questions=128 --save-every=-1)
    ;;
  full) # the classic recipe, for a node of GPUs and hours
    : "${DEPTH:=20}" "${SOURCE:=fineweb-edu}" "${VOCAB_SIZE:=65536}" "${NPROC_PER_NODE:=$GPUS}" "${SHARDS:=240}"
    TOK_TRAIN=(--max-chars=2e9)
    BASE_TRAIN=()
    BASE_LOSS=(--split-tokens=10485760)
    BASE_EVAL=()
    TASKS=SmolTalk,MMLU,GSM8K,ARC-Easy,ARC-Challenge,HumanEval,SimpleSpelling,SpellingBee,Identity
    MID=() # the recipes stand in the scripts
    SFT=(--total-batch-size=65536) # at the batch of pretraining an epoch would be 16 steps
    CHAT_EVAL=(-a "ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee")
    RL=(--task=GSM8K)
    ;;
  *) stop "PROFILE=$PROFILE: expected auto, tiny, mini or full" ;;
esac
if [ "$PROFILE" != tiny ] && [ "$GPUS" -eq 0 ]; then
  stop "PROFILE=$PROFILE needs an NVIDIA GPU and PyTorch sees none: use PROFILE=tiny, or a machine with a GPU"
fi

# ---------------------------------------------------------------------------------------------------------------------
# Names

if [[ $SOURCE == local:* ]]; then
  folder=$(cd "${SOURCE#local:}" 2>/dev/null && pwd -P) || stop "SOURCE=$SOURCE: no such folder"
  SOURCE=local:$folder
fi
DATA=base_data/$(slug "$SOURCE")
TAG=$(slug "${RUN_ID:-$PROFILE-d$DEPTH-$SOURCE}")
export NANOCHAT_RUN_ID=$TAG
CHECKPOINT=checkpoints/base/$TAG

# What starts a stage that runs as one process a GPU.
launch=(python -m)
if [ "$NPROC_PER_NODE" -gt 1 ]; then
  launch=(python -m nanochat.launch --nproc-per-node="$NPROC_PER_NODE" -- -m)
fi

# ---------------------------------------------------------------------------------------------------------------------
# The stages. --in and --out name what each reads and writes, relative to the artifact store.

# Text. Of a large source, the first shards are enough for the tokenizer; the rest comes after it.
FIRST=$((SHARDS < 8 ? SHARDS : 8))
case $SOURCE in
  fineweb-edu | climbmix) FIRST_DATA="$DATA/shard_0000[0-$((FIRST - 1))].parquet" COUNT=(-n "$FIRST") ;;
  *) FIRST_DATA=$DATA FIRST=$SHARDS COUNT=() ;; # one piece
esac
stage dataset --out "$FIRST_DATA" \
  -- python -m nanochat.dataset --source="$SOURCE" ${COUNT[@]+"${COUNT[@]}"}

# Tokenizer
stage tok_train --in "$FIRST_DATA" --out tokenizer \
  -- python -m scripts.tok_train --source="$SOURCE" --vocab-size="$VOCAB_SIZE" "${TOK_TRAIN[@]}"
stage tok_eval --in tokenizer -- python -m scripts.tok_eval --source="$SOURCE"

# The rest of the text, and the evaluation tasks
if [ "$SHARDS" -gt "$FIRST" ]; then
  stage dataset_rest --out "$DATA" -- python -m nanochat.dataset --source="$SOURCE" -n "$SHARDS"
fi
if [ -n "$EVAL_BUNDLE" ]; then
  folder=$(cd "$EVAL_BUNDLE" 2>/dev/null && pwd -P) || stop "EVAL_BUNDLE=$EVAL_BUNDLE: no such folder"
  stage eval_bundle --in "$folder" --out eval_bundle -- python -m scripts.make_eval_bundle --from-dir="$folder"
else
  stage eval_bundle --in "$DATA" --out eval_bundle -- python -m scripts.make_eval_bundle --source="$SOURCE"
fi

# Pretraining, and how good it is
stage base_train --in "$DATA" --in tokenizer --out "$CHECKPOINT" --out "$CHECKPOINT/COMPLETE" \
  -- "${launch[@]}" scripts.base_train --depth="$DEPTH" --source="$SOURCE" --model-tag="$TAG" --resume=auto \
  --run="$WANDB_RUN" ${BASE_TRAIN[@]+"${BASE_TRAIN[@]}"}
stage base_loss --in "$DATA" --in "$CHECKPOINT" \
  -- "${launch[@]}" scripts.base_loss --model-tag="$TAG" ${BASE_LOSS[@]+"${BASE_LOSS[@]}"}
stage base_eval --in eval_bundle --in "$CHECKPOINT" \
  -- "${launch[@]}" scripts.base_eval --model-tag="$TAG" ${BASE_EVAL[@]+"${BASE_EVAL[@]}"}

# Conversations: data sets from TASK_DATA or the hub, and what is made from the run's own text
FROM_DIR=()
if [ -n "$TASK_DATA" ]; then
  folder=$(cd "$TASK_DATA" 2>/dev/null && pwd -P) || stop "TASK_DATA=$TASK_DATA: no such folder"
  FROM_DIR=(--from-dir="$folder")
fi
# What the tasks read, and no more: data that another run gets later must not train this one anew. HumanEval, only graded
# by, is left out: it has no folder when it comes from an installed package.
CHAT_DATA=()
MADE=task_data/$(slug "$SOURCE")
for task in ${TASKS//,/ }; do
  case $task in
    SmolTalk | MMLU | GSM8K | ARC-Easy | ARC-Challenge) CHAT_DATA+=(--in "task_data/hub/$task") ;;
    SimpleSpelling | SpellingBee) CHAT_DATA+=(--in "$MADE/words.txt" --in "$MADE/words.json") ;;
    TextChoice) CHAT_DATA+=(--in "$MADE/text_choice*") ;;
    HumanEval | Arithmetic | Identity) ;;
    *) stop "TASKS: what does $task read?" ;;
  esac
done
stage chat_data --in "$DATA" ${TASK_DATA:+--in "$folder"} --out task_data \
  -- python -m scripts.chat_data --source="$SOURCE" --tasks="$TASKS" ${FROM_DIR[@]+"${FROM_DIR[@]}"}

# Mid-training: the base model meets conversations
MID_CHECKPOINT=checkpoints/mid/$TAG
stage mid_train --in "$CHECKPOINT" "${CHAT_DATA[@]}" --out "$MID_CHECKPOINT" --out "$MID_CHECKPOINT/COMPLETE" \
  -- "${launch[@]}" scripts.mid_train --model-tag="$TAG" --resume=auto --run="$WANDB_RUN" ${MID[@]+"${MID[@]}"}
stage chat_eval_mid --in "$MID_CHECKPOINT" "${CHAT_DATA[@]}" \
  -- "${launch[@]}" scripts.chat_eval -i mid -g "$TAG" "${CHAT_EVAL[@]}"

# Supervised fine-tuning: it learns to answer
SFT_CHECKPOINT=checkpoints/sft/$TAG
stage chat_sft --in "$MID_CHECKPOINT" "${CHAT_DATA[@]}" --out "$SFT_CHECKPOINT" --out "$SFT_CHECKPOINT/COMPLETE" \
  -- "${launch[@]}" scripts.chat_sft --model-tag="$TAG" --resume=auto --run="$WANDB_RUN" ${SFT[@]+"${SFT[@]}"}
stage chat_eval_sft --in "$SFT_CHECKPOINT" "${CHAT_DATA[@]}" \
  -- "${launch[@]}" scripts.chat_eval -i sft -g "$TAG" "${CHAT_EVAL[@]}"

# Reinforcement learning: it practises on questions that can be graded
RL_CHECKPOINT=checkpoints/rl/$TAG
if [ "$RUN_RL" = 1 ]; then
  stage chat_rl --in "$SFT_CHECKPOINT" "${CHAT_DATA[@]}" --out "$RL_CHECKPOINT" --out "$RL_CHECKPOINT/COMPLETE" \
    -- "${launch[@]}" scripts.chat_rl --model-tag="$TAG" --resume=auto --run="$WANDB_RUN" "${RL[@]}"
  stage chat_eval_rl --in "$RL_CHECKPOINT" "${CHAT_DATA[@]}" \
    -- "${launch[@]}" scripts.chat_eval -i rl -g "$TAG" "${CHAT_EVAL[@]}"
else
  stage chat_rl --skip="RUN_RL=1 bash speedrun.sh runs it"
  stage chat_eval_rl --skip="RUN_RL=1 bash speedrun.sh runs it"
fi

# ---------------------------------------------------------------------------------------------------------------------

echo
python -m nanochat.report generate
BEST=sft
if [ "$RUN_RL" = 1 ]; then BEST=rl; fi
STORE=
if [ "$NANOCHAT_BASE_DIR" != "$HOME/.cache/nanochat" ]; then STORE="NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR") "; fi
echo "talk to it:  source .venv/bin/activate && ${STORE}python -m scripts.chat_cli -i $BEST -g $TAG"
echo "next:        read report.md; make it larger (DEPTH=8 bash speedrun.sh) or train on your own text (SOURCE=local:DIR)"
