#!/usr/bin/env bash
# What a tracker costs a step: the same run without one, with W&B offline, and with a W&B server that does not answer,
# in turns, a record every step (the most there can be). Beside the median step: its share, and its range over turns.
#
#   jobs/bench/track.sh [TURNS [STEPS [SETTING=VALUE ...]]]
#
# Not yet measured on a quiet machine. What the tracker's processes need, measured apart (W&B offline, 4,000 records of
# 21 numbers, at a load of 7 on 2 cores): 0.9 s of processor time to start and end, 0.3 ms a record, at low priority, in
# a process of its own; at the default log_every a record comes every tenth step.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY=0000000000000000000000000000000000000000
turns=${1:-5} steps=${2:-100}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

declare -A words=(
  [none]='track=none' [offline]='track=wandb track.mode=offline' [unreachable]='track=wandb track.start_s=15'
)
for ((turn = 0; turn < turns; turn++)); do
  for how in none offline unreachable; do
    # shellcheck disable=SC2086 # one word a setting
    hvdllm train runs_dir="$work" name="$how-$turn" ${words[$how]} budget_tokens=$((2048 * steps)) log_every=2048 eval_every=0 \
      sample_every=0 save_every=0 audit_every=0 "${@:3}" >"$work/out" || { cat "$work/out"; exit 1; }
  done
done

python - "$work" "$turns" <<'END'
import json, sys
from pathlib import Path
from statistics import median

work, turns = Path(sys.argv[1]), int(sys.argv[2])


def step_ms(run: str) -> float:
    lines = map(json.loads, (work / run / "metrics.jsonl").read_text().splitlines())
    at = [line["seconds"] for line in lines if line["kind"] == "commit"]
    return 1000 * median(b - a for a, b in zip(at[10:], at[11:]))


base = [step_ms(f"none-{turn}") for turn in range(turns)]
print(f"none         {median(base):7.2f} ms a step  ({min(base):.2f} to {max(base):.2f})")
for how in ("offline", "unreachable"):
    here = [step_ms(f"{how}-{turn}") for turn in range(turns)]
    share = [100 * (a / b - 1) for a, b in zip(here, base)]
    print(f"{how:12} {median(here):7.2f} ms a step  {median(share):+.2f} %  ({min(share):+.2f} to {max(share):+.2f})")
END
