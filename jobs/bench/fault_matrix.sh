#!/usr/bin/env bash
# How does a run end when one rank breaks? Two real ranks; the fault comes at the fourth update, in a phase (start, data,
# forward, exchange, update, evaluation, save, shutdown) and in a mode (exception, SIGKILL, SIGSTOP, an endless loop, exit
# with code 0, no memory, a full disk). A case is right if nothing is left of the job, and if the last line says which rank
# failed, where and how. `pairs` is a sample in which any two of phase, exchange and mode meet (88 cases, ten minutes);
# `all` is every phase with every mode (616 cases, an hour); name exchanges for a part of it.
#
#   jobs/bench/fault_matrix.sh [pairs|all [EXCHANGE ...]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
exec python tests/fault_matrix.py "${1:-all}" "${@:2}"
