#!/usr/bin/env bash
# Sets everything up for development (jobs/setup.sh --dev), then lints, checks types and runs the tests; the first
# that fails ends it. Any other argument goes to pytest:
#
#   jobs/test.sh [--quick | --all | PYTEST ARGUMENT ...]
#
#   --quick    without the tests that start real ranks; the others on two processes
#   --all      also what is marked `thorough`: the same for more kinds, launchers or numbers of ranks
#
# Without arguments the tests that start real ranks run beside those that do not. tests/README.md says how tests are
# sorted, how to run a few of them, and how long each stage takes. It printed at its end:
#
#   == pytest -m ranks and not thorough
#   ... passed
#   == pytest -m not ranks and not thorough
#   ... passed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs/setup.sh --dev
export PATH=$PWD/.venv/bin:$PATH
unset PYTHONDONTWRITEBYTECODE # each process would compile hvdllm anew

stage() {
  printf '\n== %s\n' "$*"
  "$@" || { printf 'jobs/test.sh: %s failed.\n' "$*" >&2; exit 1; }
}
stage ruff check .
stage ruff format --check .
stage mypy
if [ "${1-}" = --quick ]; then
  stage pytest -n 2 --dist worksteal -m "not ranks and not thorough" "${@:2}"
elif [ "${1-}" = --all ]; then
  stage pytest "${@:2}"
elif [ $# -gt 0 ]; then
  stage pytest "$@"
else
  said=$(mktemp)
  trap 'kill "$alone" 2>/dev/null || true; rm -f "$said"' EXIT
  pytest -m "not ranks and not thorough" >"$said" 2>&1 &
  alone=$!
  stage pytest -m "ranks and not thorough"
  code=0
  wait "$alone" || code=$?
  printf '\n== pytest -m not ranks and not thorough\n'
  cat "$said"
  [ "$code" = 0 ] || { echo "jobs/test.sh: pytest failed." >&2; exit 1; }
fi
