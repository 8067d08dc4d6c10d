#!/usr/bin/env bash
# Every check of the project, on any machine:
#
#   bash runtests.sh          the fast ones
#   bash runtests.sh --all    the slow tests too
#
# Runs all of them even when one fails, and ends with a table; the exit code is 1 when any failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

marker="not slow" rust=()
case ${1:-} in
  "") ;;
  --all) marker="slow or not slow" rust=(-- --include-ignored) ;;
  *) echo "error: $1: expected nothing or --all" >&2 && exit 2 ;;
esac

source dev/setup.sh
find_cargo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more threads than cores slow the many small tests down

summary=()
failed=0

check() {
  local name=$1 started=$SECONDS result=passed
  shift
  printf '\n=== %s: %s\n' "$name" "$*"
  if ! "$@"; then
    result=FAILED
    failed=1
  fi
  summary+=("$(printf '%-14s %-7s %5d s' "$name" "$result" $((SECONDS - started)))")
}

crate() {
  (cd rustbpe && cargo "$@")
}

# rustfmt and clippy are parts that some Rust packages leave out: component SUBCOMMAND PART ARGUMENTS...
component() {
  if ! cargo "$1" --version >/dev/null 2>&1; then
    echo "error: $2 is not installed: \`rustup component add $2\`, or your system's package of that name" >&2
    return 1
  fi
  crate "$1" "${@:3}"
}

check "ruff format" ruff format --check .
check "ruff" ruff check .
check "mypy" mypy nanochat
check "cargo fmt" component fmt rustfmt --check
check "cargo clippy" component clippy clippy --locked --quiet --all-targets --all-features -- -D warnings
check "cargo test" crate test --locked --quiet ${rust[@]+"${rust[@]}"}
check "pytest" python -m pytest -q -m "$marker"

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
