#!/usr/bin/env bash
# From a fresh machine to a trained model: sets everything up (jobs/setup.sh), then two ranks under horovodrun train
# a small transformer on the Python standard library's own source. More settings may follow, as for hvdllm train:
#
#   jobs/quickstart.sh [SETTING=VALUE ...]
#
# It printed, after what jobs/setup.sh says (one line of many, and the end):
#
#   [0]<stdout>:    276,480 tokens   12%  loss 4.640 · 13,667 tokens/s · 7% blocked · 2 min 35 s left
#   [0]<stdout>:2,400,256 tokens: validation loss 3.6045, 1.570 bits per byte
#   [0]<stdout>:tokens           2,400,256 in 3 min 14 s
#   [0]<stdout>:a sample: ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs/setup.sh
export PATH=$PWD/.venv/bin:$PATH

horovodrun --gloo -np 2 hvdllm train experiment=laptop "$@"

runs=runs name=''
for setting; do
  case $setting in runs_dir=*) runs=${setting#*=} ;; name=*) name=${setting#*=} ;; esac
done
# shellcheck disable=SC2012 # names of runs are plain
run=$runs/${name:-$(ls -t "$runs" | head -1)}
next() { printf '  %-48s %s\n' "$@"; }
printf '\nWhat to try next, after  . .venv/bin/activate\n'
next "hvdllm sample $run \"class \"" "the model goes on writing"
next "hvdllm evaluate $run" "its validation loss again"
next "jobs/quickstart.sh name=mine budget_tokens=6e6" "longer; after Ctrl-C the same command goes on"
next "hvdllm train --help" "every setting, each may follow jobs/quickstart.sh too"
