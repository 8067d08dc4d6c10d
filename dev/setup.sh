#!/usr/bin/env bash
# Prepares this machine: uv, a virtual environment with the locked dependencies, and the Rust tokenizer built into it.
# speedrun.sh and runtests.sh source it; `bash dev/setup.sh` does the same by hand. Again costs a fraction of a second:
# a stamp in the environment says what it was made from.
#
#   PYTHON=python3.12            the interpreter to build the environment with (3.11 or newer)
#   UV=/path/to/uv               the uv to use; otherwise one on PATH, otherwise one is installed into .venv-uv
#   UV_PROJECT_ENVIRONMENT=DIR   where the environment goes (.venv). An activated environment is left alone, since
#                                syncing to the lock would remove whatever else is in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.9
VENV=${UV_PROJECT_ENVIRONMENT:-.venv}

declare -F stop >/dev/null || stop() { echo "error: $*" >&2 && exit 1; }
declare -F attend >/dev/null || attend() { "$@"; } # what may take minutes: dev/stages.sh says how signals reach it

is_recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate tried=${PYTHON:-python3 and python3.11 to 3.14}
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    if is_recent_python "$candidate"; then PYTHON=$candidate && return; fi
  done
  stop "no Python 3.11 or newer found (tried $tried): install one, or name it with PYTHON=..."
}

find_uv() {
  UV=${UV:-$(command -v uv || echo "$PWD/.venv-uv/bin/uv")}
  ! command -v "$UV" >/dev/null || return 0
  echo "--- installing uv $UV_VERSION into .venv-uv"
  # --target leaves the system's packages alone, so it also works where pip refuses to touch them (PEP 668);
  # without any pip, venv may still bring one.
  if "$PYTHON" -m pip --version >/dev/null 2>&1; then
    attend "$PYTHON" -m pip install --quiet --target .venv-uv "uv==$UV_VERSION"
  else
    "$PYTHON" -m venv .venv-uv && .venv-uv/bin/pip install --quiet "uv==$UV_VERSION"
  fi || stop "cannot install uv with $PYTHON (see above): install uv yourself, or give $PYTHON pip or venv"
  [ -x "$UV" ] || stop "pip ended well but there is no $UV: install uv yourself"
}

find_cargo() {
  command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-${HOME:-~}/.cargo}/bin
  command -v cargo >/dev/null ||
    stop "cargo not found: install Rust 1.85 or newer (rustup, or your system's rust package) and run again"
  cargo --version >/dev/null 2>&1 || stop "cargo has no toolchain to run: call \`rustup default stable\` and run again"
}

# What the environment is made from: one line a file (checksum, size, name), and the interpreter.
fingerprint() {
  find requirements.lock rustbpe -path rustbpe/target -prune -o -type f -print | LC_ALL=C sort | xargs cksum
  "$VENV/bin/python" --version
}

prepare() {
  find_python
  find_cargo
  find_uv
  is_recent_python "$VENV/bin/python" || "$UV" venv --quiet --clear --no-project --python "$PYTHON" "$VENV"
  rm -f "$VENV/.setup-stamp"
  echo "--- installing the locked dependencies into $VENV"
  attend "$UV" pip sync --python "$VENV/bin/python" --require-hashes requirements.lock
  echo "--- building rustbpe"
  PATH=$(dirname "$UV"):$PATH VIRTUAL_ENV=$(cd "$VENV" && pwd) \
    attend "$VENV/bin/maturin" develop --uv --release --locked --manifest-path rustbpe/Cargo.toml
  fingerprint >"$VENV/.setup-stamp"
}

{ [ -f "$VENV/.setup-stamp" ] && is_recent_python "$VENV/bin/python" && fingerprint | cmp -s - "$VENV/.setup-stamp"; } ||
  prepare
PATH=$(cd "$VENV" && pwd)/bin:$PATH
export PATH
