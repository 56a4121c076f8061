#!/usr/bin/env bash
# How fast a stream is read and trained on.
#
#   jobs/bench/stream.sh intake [DOCUMENTS]    documents of 1 kB a second from Redis into the log; the reader has one core
#   jobs/bench/stream.sh train [PAIRS]         tokens a second from a log, beside those from shards of the same documents
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
exec python tests/stream_rate.py "$@"
