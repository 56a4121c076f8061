#!/usr/bin/env bash
# Does an exchange ever hang? RUNS runs (50) each on 3 real ranks, with heavy-tailed delays before every micro-batch and
# asks for a save or a stop at random moments; a run that writes nothing for LIMIT seconds (60) fails with the stack of
# every thread of every rank. CI runs 3 each (tests/test_no_hang.py).
#
#   jobs/bench/no_hang.sh [RUNS [LIMIT [EXCHANGE[+SETTING=VALUE ...] ...]]]
#
# On 2 cores, with a limit of 120 s, beside a training of 2 threads (less would be waited for on an idle machine):
#
#   allreduce                                                50 runs, 40 to the budget, 10 stopped by an ask, 159 s
#   sharded                                                  50 runs, 40 to the budget, 10 stopped by an ask, 184 s
#   delayed                                                  50 runs, 40 to the budget, 10 stopped by an ask, 165 s
#   acco                                                     50 runs, 38 to the budget, 12 stopped by an ask, 210 s
#   acco+exchange.timed=true                                 50 runs, 50 to the budget, 0 stopped by an ask, 152 s
#   local_sgd                                                50 runs, 39 to the budget, 11 stopped by an ask, 182 s
#   diloco                                                   50 runs, 50 to the budget, 0 stopped by an ask, 157 s
#   streaming_diloco                                         50 runs, 40 to the budget, 10 stopped by an ask, 161 s
#   fedavg                                                   50 runs, 45 to the budget, 5 stopped by an ask, 179 s
#   parameter_server+exchange.staleness=0                    50 runs, 44 to the budget, 6 stopped by an ask, 214 s
#   parameter_server+exchange.staleness=2                    50 runs, 45 to the budget, 5 stopped by an ask, 281 s
#   parameter_server                                         50 runs, 43 to the budget, 7 stopped by an ask, 298 s
#   parameter_server+exchange.staleness=0+exchange.servers=1 50 runs, 42 to the budget, 8 stopped by an ask, 204 s
#   parameter_server+exchange.staleness=1+exchange.servers=1 50 runs, 43 to the budget, 7 stopped by an ask, 194 s
#   parameter_server+exchange.servers=1                      50 runs, 43 to the budget, 7 stopped by an ask, 224 s
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
