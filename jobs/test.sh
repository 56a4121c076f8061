#!/usr/bin/env bash
# Sets everything up for development (jobs/setup.sh --dev), then lints, checks types and runs the tests; the first
# that fails ends it. Arguments go to pytest:
#
#   jobs/test.sh [PYTEST ARGUMENT ...]
#
# On two cores it takes about three minutes for the set-up, once, and about seven for the tests. It printed at its end:
#
#   == pytest
#   ... passed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs/setup.sh --dev
export PATH=$PWD/.venv/bin:$PATH

stage() {
  printf '\n== %s\n' "$*"
  "$@" || { printf 'jobs/test.sh: %s failed.\n' "$*" >&2; exit 1; }
}
stage ruff check .
stage ruff format --check .
stage mypy
stage pytest "$@"
