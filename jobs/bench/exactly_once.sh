#!/usr/bin/env bash
# Is each document of a stream learnt exactly once, whatever is killed? Two real ranks, joined by Horovod's Gloo as
# horovodrun joins them, train by all-reduce on a stream of numbered documents. At random moments a rank, the process that
# reads the stream, or redis-server gets SIGKILL, and the same command goes on. At the end the documents in the windows
# that were trained on are compared with the stream, and the records (loss, norm, prequential losses) bit by bit with
# those of a run that was never killed, on the same log and rounds. CI does two kills each (tests/test_exactly_once.py).
#
#   jobs/bench/exactly_once.sh [--times KILLS] [SOURCE [SEED [HOW [EXCHANGE]]]]
#
# KILLS: 50. SOURCE: redis, folder or readers (two readers that share a folder), or else all of them. HOW: gloo (ranks of
# this process, as horovodrun joins them) or 'real gloo' (horovodrun itself).
#
# On 2 cores, beside other work (28 November 2026):
#
#   redis  seed 11  50 kills (rank 0 10, rank 1 16, reader 8, redis-server 16), 24 lives of the run, 1,560 documents in
#                   the log, 1,542 in what was trained on or held out (the rest is less than a round), 322 rounds,
#                   317 records equal bit by bit, 188 s
#   redis  seed 101 50 kills with 'real gloo' (rank 0 12, rank 1 15, redis-server 23), 28 lives, 1,560 documents in the
#                   log, 1,542 trained on or held out, 320 rounds, 317 records equal bit by bit, 286 s
#   readers seed 103, gloo, acco: 20 kills (rank 0 5, rank 1 9, reader 6), 660 documents, 131 records equal bit by bit
#   folder seed 104, gloo, delayed: 20 kills (rank 0 9, rank 1 3, reader 8), 660 documents, 131 records equal bit by bit
#   folder seed 12  50 kills (rank 0 14, rank 1 21, reader 15), 30 lives, 1,560 documents in the log, 1,530 trained on or
#                   held out, 326 rounds, 317 records equal bit by bit, 200 s
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
kills=50
if [[ ${1:-} == --times ]]; then
  kills=$2
  shift 2
fi
exec python tests/exactly_once.py "$kills" "$@"
