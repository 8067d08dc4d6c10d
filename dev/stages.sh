# What speedrun.sh and pretrain.sh share; both source it.
set -euo pipefail
shopt -s extglob

# A safe folder name, as nanochat/paths.py makes it.
slug() {
  local name=${1//+([^A-Za-z0-9._])/-}
  name=${name#-}
  printf %s "${name%-}"
}

# Runs one stage unless it is done (see nanochat/pipeline.py). In the background, because bash answers signals only
# between commands: the runner hands them to the stage, which saves its state before it leaves. Slurm sends USR1 to all
# of us at once; the runner does not know it, so it is kept from it and told TERM. After a signal the script ends with
# STOPPED_CODE, where that is set.
stage() {
  local runner code=0 stopped=
  (
    trap '' USR1
    exec python -m nanochat.pipeline run "$@"
  ) &
  runner=$!
  trap ':' INT
  trap 'stopped=1; kill -TERM "$runner" 2>/dev/null || true' TERM HUP USR1
  while kill -0 "$runner" 2>/dev/null; do
    code=0
    wait "$runner" || code=$?
  done
  trap - INT TERM HUP USR1
  if [ -n "$stopped" ] && [ -n "${STOPPED_CODE:-}" ]; then exit "$STOPPED_CODE"; fi
  [ "$code" -eq 0 ] || exit "$code"
}
