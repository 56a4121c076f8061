#!/usr/bin/env bash
# Does an exchange ever hang? RUNS runs (50) each on 3 real ranks, with heavy-tailed delays before every micro-batch and
# asks for a save or a stop at random moments; a run that writes nothing for LIMIT seconds (60) fails with the stack of
# every thread of every rank. CI runs 3 each (tests/test_no_hang.py).
#
#   jobs/bench/no_hang.sh [RUNS [LIMIT [EXCHANGE[+SETTING=VALUE ...] ...]]]
#
# Not yet run fifty times. Three each, at a load of 12 on 2 cores, most of the time the start of the ranks:
#
#   parameter_server+exchange.staleness=2      3 runs, 3 to the budget, 0 stopped by an ask, 107 s
#   parameter_server+exchange.servers=1        3 runs, 3 to the budget, 0 stopped by an ask, 116 s
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH
runs=${1:-50} limit=${2:-60}
exchanges=("${@:3}")
if ((${#exchanges[@]} == 0)); then
  server=parameter_server
  exchanges=(
    allreduce sharded delayed acco acco+exchange.timed=true local_sgd diloco streaming_diloco fedavg
    $server+exchange.staleness=0 $server+exchange.staleness=2 $server
    $server+exchange.staleness=0+exchange.servers=1 $server+exchange.staleness=1+exchange.servers=1 $server+exchange.servers=1
  )
fi
exec python tests/no_hang.py "$runs" "$limit" "${exchanges[@]}"
