#!/usr/bin/env bash
# What a tracker costs a step. In one run the tracker's processes are stopped and let go on in turns, in pairs of blocks,
# either first by lot, and the blocks of a pair are compared: runs differ from each other by more than is looked for.
# What was recorded while they were stopped is sent in the block in which they go on, with its own: what is shown is the
# cost of twice the records. The processor time of the tracker's processes moves less and bounds it: where all cores
# compute, what the tracker takes of one is what a step can get longer by.
#
#   jobs/bench/track.sh [PAIRS [SECONDS OF A BLOCK [SETTING=VALUE ...]]]
#
# At least six pairs. With 13 of 14 s (2 cores, both used by the run, nothing else running; the default log_every is a
# record every tenth step) it gave, then as means with normal intervals, which for so few pairs are a tenth too narrow:
#
#   W&B offline      257.24 ms a step without, -0.35 % with (95 %: -4.97 to +4.50; 13 pairs); 0.20 % of one core
#   W&B, no server   248.79 ms a step without, +0.58 % with (95 %: -5.12 to +6.63; 13 pairs); 0.21 % of one core
#
# With the system's statistics, which it sends since, 8 pairs of 8 s: 164.92 ms, +3.81 % (-4.49 to +16.45) and 175.14 ms,
# +4.27 % (-7.26 to +8.38); 0.25 % of one core in both.
#
# And before, with a record every step, 50 pairs of 5 s: 247.38 ms, +2.31 % (+0.61 to +4.05) for twice the records, so
# 1.2 % for a record every step and a tenth of that by default; 0.77 % of one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=$PWD/.venv/bin:$PATH WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY=0000000000000000000000000000000000000000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python - "$work" "${1:-20}" "${2:-15}" "${@:3}" <<'END'
import json, os, random, shutil, signal, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from statistics import median

from hvdllm.bench.paired import ratio

WORK, PAIRS, BLOCK_S, MORE = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
HOW = {
    "W&B offline": ["track=wandb", "track.mode=offline"],
    "W&B, no server": ["track=wandb", "track.start_s=15"],
}


def commits(run: Path) -> list[tuple[float, int]]:
    """When each recorded step ended, in seconds, and its number."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(line["seconds"], line["step"]) for line in lines if line["kind"] == "commit"]


def family(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(each for child in children for each in family(child))]


def tracker(pid: int) -> list[int]:
    (root,) = (each for each in family(pid) if b"hvdllm.track.process" in Path(f"/proc/{each}/cmdline").read_bytes())
    return family(root)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def processor_s(pids: list[int]) -> float:
    """Of these and of those of their children that ended."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:15] for pid in pids]
    return sum(int(ticks) for each in fields for ticks in each) / os.sysconf("SC_CLK_TCK")


def measure(name: str, words: list[str]) -> None:
    run, pids = WORK / "run", list[int]()
    settings = [f"runs_dir={WORK}", "name=run", "budget_tokens=1000000000"]
    settings += [f"{kind}_every=0" for kind in ("eval", "sample", "save", "audit")]
    with open(WORK / "out", "w") as out:
        process = subprocess.Popen(["hvdllm", "train", *settings, *words, *MORE], stdout=out, stderr=out)
    try:
        while process.poll() is None and not ((run / "metrics.jsonl").exists() and len(commits(run)) > 2):
            time.sleep(0.5)
        if process.poll() is not None:
            sys.exit((WORK / "out").read_text())
        time.sleep(20)  # a tracker has found out by then whether there is a server
        pids = tracker(process.pid)
        before, (begun_s, _) = processor_s(pids), commits(run)[-1]
        ratios, ms = [], []
        for _ in range(PAIRS):
            pair = {}
            for awake in random.sample((True, False), 2):
                pids = tracker(process.pid)
                send(pids, signal.SIGCONT if awake else signal.SIGSTOP)
                begun = len(commits(run))
                time.sleep(BLOCK_S)
                (start_s, start), *_, (end_s, end) = commits(run)[begun:]
                pair[awake] = 1000 * (end_s - start_s) / (end - start)
            ratios.append(pair[True] / pair[False])
            ms.append(pair[False])
        send(pids, signal.SIGCONT)
        time.sleep(1)
        spent = (processor_s(tracker(process.pid)) - before) / (commits(run)[-1][0] - begun_s)
    finally:
        send(pids, signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        process.wait()
    found = ratio(ratios)
    here, low, high = (100 * (each - 1) for each in (found.median, found.low, found.high))
    print(
        f"{name:15} {median(ms):7.2f} ms a step without, {here:+.2f} % with (95 %: {low:+.2f} to {high:+.2f}; {PAIRS} pairs);"
        f" {100 * spent:.2f} % of one core",
        flush=True,
    )
    shutil.rmtree(run)


for name, words in HOW.items():
    measure(name, words)
END
