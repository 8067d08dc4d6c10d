#!/usr/bin/env bash
# Runs a command on nodes of Volcengine's machine learning platform:
#
#   NNODES=4 bash volc/volc_submit.sh bash pretrain.sh --depth=32
#   NNODES=4 bash volc/volc_submit.sh --dry-run bash pretrain.sh --depth=32     only shows the task; needs no account
#
# Queue, flavor, image and storage come from volc/config (copy config.example) or the environment. WANDB_API_KEY,
# HF_TOKEN, what VOLC_SECRETS names and addresses with a password in them (HF_ENDPOINT) are passed on as private variables,
# shown as ***. Sent with it is a clean copy of this repository: what git tracks or does not ignore. The task is started
# again when it fails or is reclaimed, and goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
  echo "error: $*" >&2
  exit 1
}

DRY_RUN=
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
case ${1:-} in -*) stop "$1: expected --dry-run or a command, as in: bash pretrain.sh --depth=32" ;; esac

# Any Python with pyyaml will do: the machine that submits need not be able to train.
for PYTHON in ${PYTHON:-.venv/bin/python python3 python}; do
  if "$PYTHON" -c 'import yaml' 2>/dev/null; then break; fi
  PYTHON=
done
[ -n "$PYTHON" ] || stop "no Python with pyyaml here: \`bash dev/setup.sh\`, or \`pip install pyyaml\`"

if [ -n "$DRY_RUN" ]; then
  exec "$PYTHON" volc/render.py "$@"
fi
command -v volc >/dev/null || stop "the volc CLI is not on PATH: install it and run \`volc configure\`, or use --dry-run"

FOLDER=$(mktemp -d) # only we can look into it
trap 'rm -rf "$FOLDER"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
"$PYTHON" volc/render.py --out="$FOLDER" "$@"
cd "$FOLDER/code" # UserCodePath is ./
volc ml_task submit --conf "$FOLDER/task.yaml" | tee "$FOLDER/said"
ID=$(grep -oE 't-[0-9]{14}-[a-z0-9]+' "$FOLDER/said" | head -n 1) || ID=TASK_ID # as in its list: volc ml_task list
echo "
state:          volc ml_task get --id $ID
log of node 0:  volc ml_task logs --task $ID --instance worker_0 -f
as accepted:    volc ml_task export --task $ID --config
end it:         volc ml_task cancel --id $ID"
