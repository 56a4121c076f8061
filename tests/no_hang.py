"""Does an exchange ever hang? Runs on real ranks with heavy-tailed delays and asks at random moments, one after the
other in one start (of each NAME); a run that writes nothing for longer than its limit fails with every rank's stack.

    python tests/no_hang.py RUNS LIMIT_S NAME ...

NAME: an exchange, with settings after a plus each (parameter_server+exchange.staleness=2). See jobs/bench/no_hang.sh.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from launch import BATCH, RANKS, Job, records, words_of

RANKS_N, STEPS = 3, 12
ALARM_S = 15  # a heartbeat that names a rank ends the job, so that a false alarm fails
START_S = 120.0  # that the start of the ranks may take beside the limit, on a busy machine


class StoodStill(AssertionError):
    pass


def settings(name: str) -> list[str]:
    kind, *more = name.split("+")
    words = [f"exchange={kind}", *more]
    if kind in ("parameter_server", "ddp", "horovod"):
        words.append("exchange.bucket_mb=null")
    if kind in ("diloco", "local_sgd", "streaming_diloco", "fedavg") and not any("local_steps" in w for w in more):
        words.append("exchange.local_steps=8")
    return words


def launcher(name: str) -> str:
    return {"parameter_server": "mpi", "ddp": "torchrun"}.get(name.split("+")[0], "gloo")


def no_hang(names: list[str], times: int, limit_s: float, tmp: Path, first: int = 0, **do: Any) -> dict[str, Counter]:
    """How the runs of each name ended ("budget", "stop"); all in one start, so all with the same launcher. first: seed
    of a name's first run. do: more that ranks/meddle.py takes. Raises StoodStill; AssertionError if a rank fails."""
    often = [f"save_every={5 * BATCH}", f"eval_every={4 * BATCH}", f"audit_every={6 * BATCH}", "eval_tokens=64"]
    often += [f"hang_after={ALARM_S}"]
    cases = [(name, seed) for name in names for seed in range(first, first + times)]
    folders = [f"{name.translate(str.maketrans('+=.', '---'))}-{seed}" for name, seed in cases]
    specs = [
        {"words": words_of(tmp, folder, STEPS, *often, *settings(name)), "do": {"chaos": seed, **do}}
        for (name, seed), folder in zip(cases, folders, strict=True)
    ]
    path = tmp / "specs.json"
    path.write_text(json.dumps(specs))
    runs = [tmp / "runs" / folder for folder in folders]
    with Job([sys.executable, str(RANKS / "body_runs.py"), str(path)], launcher(names[0]), RANKS_N) as job:
        written, since = -1, time.monotonic()
        while job.process.poll() is None:
            size = sum(file.stat().st_size for run in runs for file in run.glob("metrics.jsonl"))
            if size != written:
                written, since = size, time.monotonic()
            elif time.monotonic() - since > limit_s + (0.0 if size else START_S):
                name, seed = cases[max((k for k, run in enumerate(runs) if run.exists()), default=0)]
                raise StoodStill(f"{name}, seed {seed}: nothing for {limit_s:g} s\n{stacks(job)}")
            time.sleep(0.1)
        done = job.wait()
        assert done.code == 0, f"{', '.join(names)}: code {done.code}\n{done.out}"
    ends: dict[str, Counter] = {name: Counter() for name in names}
    for (name, _), run in zip(cases, runs, strict=True):
        ends[name][records(run, "end")[-1]["reason"]] += 1
    return ends


def stacks(job: Job) -> str:
    """What all threads of all ranks are at (faulthandler, on SIGUSR2; see ranks/body_runs.py)."""
    for rank in range(RANKS_N):
        try:
            os.kill(job.rank(rank), signal.SIGUSR2)
        except ValueError:
            continue  # it is gone
        time.sleep(0.5)
    return job.out


def main(argv: list[str]) -> int:
    times, limit_s = int(argv[0]), float(argv[1])
    failed = False
    with tempfile.TemporaryDirectory() as tmp:
        for name in argv[2:]:
            begin = time.monotonic()
            try:
                ends = no_hang([name], times, limit_s, Path(tmp))[name]
            except AssertionError as error:
                print(f"{name:56} FAILED\n{error}", flush=True)
                failed = True
                continue
            spent = time.monotonic() - begin
            how = f"{ends['budget']} to the budget, {ends['stop']} stopped by an ask"
            print(f"{name:56} {times} runs, {how}, {spent:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
