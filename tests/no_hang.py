"""Does an exchange ever hang? Runs on real ranks with heavy-tailed delays and asks at random moments, one after the
other in one start; a run that writes nothing for longer than its limit fails with every rank's stack.

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from launch import BATCH, RANKS, Job, records, words_of

RANKS_N, STEPS = 3, 12
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


def no_hang(name: str, times: int, limit_s: float, tmp: Path, first: int = 0, **do: Any) -> tuple[int, int]:
    """How many of the runs met their budget, and how many ended by a stop. first: seed of the first run. do: more that
    ranks/meddle.py takes."""
    often = [f"save_every={5 * BATCH}", f"eval_every={4 * BATCH}", f"audit_every={6 * BATCH}", "eval_tokens=64"]
    kind = name.replace("+", "-").replace("=", "-").replace(".", "-")
    specs = [
        {"words": words_of(tmp, f"{kind}-{k}", STEPS, *often, *settings(name)), "do": {"chaos": first + k, **do}}
        for k in range(times)
    ]
    path = tmp / f"{kind}.json"
    path.write_text(json.dumps(specs))
    folders = [tmp / "runs" / f"{kind}-{k}" for k in range(times)]
    with Job([sys.executable, str(RANKS / "body_runs.py"), str(path)], launcher(name), RANKS_N) as job:
        seen, since = -1, time.monotonic()
        while job.process.poll() is None:
            size = sum(f.stat().st_size for folder in folders for f in folder.glob("metrics.jsonl"))
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > limit_s + (0.0 if size else START_S):
                number = max((k for k, folder in enumerate(folders) if folder.exists()), default=0)
                raise StoodStill(f"{name}, seed {first + number}: nothing for {limit_s:g} s\n{stacks(job)}")
            time.sleep(0.1)
        done = job.wait()
        assert done.code == 0, f"{name}: code {done.code}\n{done.out}"
    ends = [records(folder, "end")[-1]["reason"] for folder in folders]
    return ends.count("budget"), ends.count("stop")


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
                met, stopped = no_hang(name, times, limit_s, Path(tmp))
            except AssertionError as error:
                print(f"{name:42} FAILED\n{error}", flush=True)
                failed = True
                continue
            spent = time.monotonic() - begin
            print(
                f"{name:42} {times} runs, {met} to the budget, {stopped} stopped by an ask, {spent:.0f} s", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
