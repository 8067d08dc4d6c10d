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

# Any Python with pyyaml will do: the machine that submits need not be able to train.
for python in ${PYTHON:-.venv/bin/python python3 python}; do
  if "$python" -c 'import yaml' 2>/dev/null; then exec "$python" volc/render.py "$@"; fi
done
echo "error: no Python with pyyaml here: \`bash dev/setup.sh\`, or \`pip install pyyaml\`" >&2
exit 1
