#!/usr/bin/env bash
# Every check of the project, on any machine:
#
#   bash runtests.sh          the fast ones
#   bash runtests.sh --all    the slow tests too
#
# Runs all of them even when one fails, and ends with a table; the exit code is 1 when any failed.
# Rust is compiled and tested beside Python's checks, and pytest has a worker a core: most of the time of these tests is
# waiting for small processes to start (two cores: 25 minutes one after the other, see docs/decisions.md).
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
unset PYTHONDONTWRITEBYTECODE # with it every process compiles what it imports: torch takes 3.1 s of CPU and not 1.6
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# check NAME COMMAND...: runs it and leaves its row of the table in $results, whichever process this is.
check() {
  local name=$1 started=$SECONDS result=passed
  shift
  printf '\n=== %s: %s\n' "$name" "$*"
  if ! "$@"; then result=FAILED; fi
  printf '%-14s %-7s %5d s\n' "$name" "$result" $((SECONDS - started)) >"$results/$name"
}

# rustfmt and clippy are parts that some Rust packages leave out: component SUBCOMMAND PART ARGUMENTS...
component() {
  if ! cargo "$1" --version >/dev/null 2>&1; then
    echo "error: $2 is not installed: \`rustup component add $2\`, or your system's package of that name" >&2
    return 1
  fi
  cargo "$1" "${@:3}"
}

rust_checks() {
  cd rustbpe
  check "cargo fmt" component fmt rustfmt --check
  # in the release profile, whose dependencies (zstd in C) setup has built: 20 s of CPU instead of 136
  check "cargo clippy" component clippy clippy --release --locked --quiet --all-targets --all-features -- -D warnings
  check "cargo test" cargo test --locked --quiet ${rust[@]+"${rust[@]}"}
}

rust_checks >"$results.log" 2>&1 &
check "ruff format" ruff format --check .
check "ruff" ruff check .
check "mypy" mypy nanochat
check "import-linter" lint-imports
check "pytest" python -m pytest -q -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -m "$marker"
wait
cat "$results.log"
rm -f "$results.log"

printf '\n'
cat "$results"/*
rows=("$results"/*)
[ ${#rows[@]} -eq 8 ] && ! grep -q FAILED "${rows[@]}" # a check that was killed has left no row
