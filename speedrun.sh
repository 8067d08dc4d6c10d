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
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/stages.sh

# ---- Overrides: set any of these in the environment

remember_command "bash speedrun.sh" PROFILE DEPTH SOURCE VOCAB_SIZE SHARDS NPROC_PER_NODE WANDB_RUN RUN_ID EVAL_BUNDLE \
  TASK_DATA RUN_RL NANOCHAT_BASE_DIR

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

# ---- Set-up (uv, .venv, locked dependencies, the Rust tokenizer; nothing to do the second time), and the profile

source dev/setup.sh

GPUS=$(python -c 'from nanochat.launch import visible_gpus; print(visible_gpus())')
if [ "$PROFILE" = auto ]; then
  if [ "$GPUS" -gt 0 ]; then PROFILE=full; else PROFILE=tiny; fi
fi
case $RUN_RL in 0 | 1) ;; *) stop "RUN_RL=$RUN_RL: expected 0 or 1" ;; esac
# shellcheck source=profiles/full.sh
case $PROFILE in
  tiny | mini | full) source "profiles/$PROFILE.sh" ;;
  *) stop "PROFILE=$PROFILE: expected auto, tiny, mini or full" ;;
esac
if [ "$PROFILE" != tiny ] && [ "$GPUS" -eq 0 ]; then
  stop "PROFILE=$PROFILE needs an NVIDIA GPU and PyTorch sees none: use PROFILE=tiny, or a machine with a GPU"
fi
name_run

launch=(python -m) # what starts a stage that runs as one process a GPU
if [ "$NPROC_PER_NODE" -gt 1 ]; then
  launch=(python -m nanochat.launch --nproc-per-node="$NPROC_PER_NODE" -- -m)
fi

# ---- The stages, as dev/stages.sh writes them, and the report

base_stages # text, tokenizer, pretraining
chat_stages # conversations, mid-training, supervised fine-tuning
BEST=sft
if [ "$RUN_RL" = 1 ]; then
  rl_stages # reinforcement learning
  BEST=rl
else
  skip_rl "RUN_RL=1 bash speedrun.sh runs it"
fi

echo
python -m nanochat.report generate
STORE=
if [ "$NANOCHAT_BASE_DIR" != "$HOME/.cache/nanochat" ]; then STORE="NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR") "; fi
echo "talk to it:  source .venv/bin/activate && ${STORE}python -m scripts.chat_cli -i $BEST -g $TAG"
echo "next:        read report.md; make it larger (DEPTH=8 bash speedrun.sh) or train on your own text (SOURCE=local:DIR)"
