#!/usr/bin/env bash
# Raw text to a model that chats, and a report of how good it is:
#
#   bash speedrun.sh                 tiny without a GPU, full with one
#   bash speedrun.sh --run-rl        reinforcement learning too; or RUN_RL=1
#   bash speedrun.sh --profile=mini --source=local:/my/text --task-data=/my/tasks
#   bash speedrun.sh --depth=8 --save-every=100     and any flag of base_train (python -m scripts.base_train --help)
#
# Call it again to continue: stages that are done are skipped, training goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source dev/settings.sh
source dev/stages.sh

# ---- Overrides: these and those of dev/settings.sh, in the environment as DEPTH=8 or as a flag, --depth=8

OVERRIDES="PROFILE=auto         auto, tiny (2 CPU cores, no network), mini (one GPU, minutes), full (GPUs, hours)
RUN_RL=0             1: reinforcement learning after SFT
$OVERRIDES"
take_settings "$@"

# ---- Set-up (uv, .venv, locked dependencies, the Rust tokenizer; nothing to do the second time), and the profile

source dev/setup.sh
count_gpus
if [ "$PROFILE" = auto ]; then PROFILE=$([ "$GPUS" -gt 0 ] && echo full || echo tiny); fi
[ "$PROFILE" = tiny ] || [ "$GPUS" -gt 0 ] ||
  stop "PROFILE=$PROFILE needs an NVIDIA GPU and PyTorch sees none: use PROFILE=tiny, or a machine with a GPU"
if [ "$PROFILE" = tiny ] && [ -n "$TASK_DATA" ]; then echo "TASK_DATA=$TASK_DATA: no task of PROFILE=tiny comes from there"; fi
source "profiles/$PROFILE.sh"
name_run

launch=(python -m) # what starts a stage that runs as one process a GPU
if [ "$NPROC_PER_NODE" -gt 1 ]; then launch+=(nanochat.launch --nproc-per-node="$NPROC_PER_NODE" -- -m); fi

# ---- The stages, as dev/stages.sh writes them, and the report

walk() {
  base_stages # text, tokenizer, pretraining
  chat_stages # conversations, mid-training, supervised fine-tuning
  if [ "$RUN_RL" = 1 ]; then rl_stages; else skip_rl "RUN_RL=1 bash speedrun.sh runs it"; fi
}
check_stages
walk

echo
report
START="source .venv/bin/activate && " MODEL="-i $([ "$RUN_RL" = 1 ] && echo rl || echo sft) -g $TAG"
if [ "$NANOCHAT_BASE_DIR" != "$HOME/.cache/nanochat" ]; then START+="NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR") "; fi
echo "talk to it:  ${START}python -m scripts.chat_cli $MODEL"
echo "in browser:  ${START}python -m scripts.chat_web $MODEL    # http://127.0.0.1:8000"
echo "next:        open report.html; make it larger (DEPTH=8 bash speedrun.sh) or train on your own text (SOURCE=local:DIR)"
