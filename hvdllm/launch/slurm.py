"""Each point as a Slurm job, by plain sbatch: this process submits it, waits, and returns its exit code.

Plain sbatch and not submitit: a point is a command, and submitit would send a serialised function to a Python that must
be the same on the node, poll by sacct, which needs accounting, and know neither how=gloo nor our requeue. What stands
in the script can be read and submitted again by hand.

Beside the point's folder, in runs_dir, stand `.<name>.sbatch`, the script, and `.<name>.job`, the number of its job: a
job that is queued or runs is joined, never submitted twice, also by another process or after Ctrl-C, which leaves jobs
alone. `--dependency=singleton` under a name that is the folder's own sees to it that even two jobs for one folder run
one after the other. All that a run prints is in launch.log in the point's folder, of all its lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hvdllm import runs
from hvdllm.errors import UserError
from hvdllm.interpreter import PYTHON
from hvdllm.launch.base import Point, Say, command
from hvdllm.launch.parts import Slurm
from hvdllm.squeue import ENDED, ask, said, slurm

POLL_S = (0.5, 15.0)  # between two questions to Slurm: the first, and the longest; each costs its controller a little
REQUEUE_S = 60  # before the time limit, in which a run saves


def ready(settings: Slurm) -> None:
    """Nothing need be there."""


def launch(point: Point, settings: Slurm, stop: threading.Event, say: Say) -> int:
    """Submits the point, or joins its job, and waits for its end. 130: Ctrl-C; the job goes on.

    Raises UserError where Slurm takes no job, with its own message.
    """
    point.folder.mkdir(parents=True, exist_ok=True)
    job, new = submit_once(point, settings)
    say(f"{point.name}: job {job} {'submitted' if new else 'was submitted before: waiting for it'}")
    shown, pause = "", POLL_S[0]
    while not stop.wait(pause):
        now = ask(job)
        if now is None:  # it ended so long ago that Slurm has forgotten it
            return 0 if finished(point.folder) else 1
        if now.state in ENDED:
            if now.state not in ("COMPLETED", "FAILED"):
                say(f"{point.name}: job {job} ended as {now.state}")
            return now.code or (0 if now.state == "COMPLETED" else 1)
        words = now.state.lower() + (f" ({now.reason})" if now.reason not in ("None", "") else "")
        pause = POLL_S[0] if words != shown else min(1.5 * pause, POLL_S[1])
        if words != shown and now.state != "COMPLETING":
            say(f"{point.name}: job {job} is {words}")
        shown = words
    say(f"{point.name}: job {job} goes on without us: the same command joins it, `scancel {job}` ends it")
    return 130


def submit_once(point: Point, settings: Slurm) -> tuple[str, bool]:
    """The number of this point's job, and whether it was submitted now. Of two processes one submits."""
    with locked(beside(point, "job")) as file:
        job = file.read().strip()
        now = ask(job) if job else None
        if now is not None and now.state == "UNKNOWN":  # whether it runs nobody knows: a second one could be too many
            raise UserError(f"Slurm does not say how job {job} of {point.name} is ({now.reason}): try again later")
        if now is not None and now.state not in ENDED and now.name == job_name(point):
            return job, False
        job = submit(point, settings)
        file.seek(0)
        file.truncate()
        file.write(f"{job}\n")
        return job, True


def submit(point: Point, settings: Slurm) -> str:
    """Writes the script and gives it to sbatch. Returns the job's number."""
    script = beside(point, "sbatch")
    words = ["sbatch", "--parsable", *options(point, settings), str(script.absolute())]
    runs.write_whole(script, text_of(point, settings, words))
    done = slurm(words)
    if done.returncode:
        raise UserError(
            f"Slurm refuses {point.name} ({said(done.stderr)}): launch.partition, launch.account, launch.nodes and the "
            "other settings of launch=slurm change what is asked for, `sinfo` shows what there is"
        )
    return done.stdout.strip().split(";")[0]  # with several clusters NUMBER;CLUSTER


def options(point: Point, settings: Slurm) -> list[str]:
    """Of sbatch. The user's own come last and win."""
    log = str((point.folder / "launch.log").absolute()).replace("\\", "\\\\").replace("%", "%%")
    chosen = {
        "nodes": settings.nodes,
        "ntasks-per-node": settings.ranks_per_node,
        "gpus-per-node": settings.gpus_per_node,
        "cpus-per-task": settings.cpus_per_rank,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "job-name": job_name(point),
        "output": log,
        "open-mode": "append",
        "signal": f"B:USR1@{REQUEUE_S}",
        "dependency": "singleton",
    }
    words = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    return [*words, "--requeue", *(word for option in several(settings.options) for word in shlex.split(option))]


def text_of(point: Point, settings: Slurm, submitted: list[str]) -> str:
    """The batch script. It ends as launch/inside.py, which hears of the time limit and starts the ranks."""
    inside = [*PYTHON, "hvdllm.launch.inside", "--how", settings.how]
    inside += ["--interface", settings.interface] if settings.interface else []
    # In one line, for the next would be a command.
    lines = ["#!/bin/bash", f"# Submitted by: {' '.join(shlex.join(submitted).split())}"]
    if modules := several(settings.modules):
        lines += ["type module >/dev/null 2>&1 || . /etc/profile", f"module load {shlex.join(modules)} || exit 1"]
    lines.append(f"exec {shlex.join([*inside, '--', *command(point)])}")
    return "\n".join(lines) + "\n"


def finished(folder: Path) -> bool:
    ends = [record for record in runs.records(folder) if record.get("kind") == "end"]
    return bool(ends) and ends[-1].get("reason") == "budget"


def job_name(point: Point) -> str:
    """Of the folder alone: what `singleton` goes by, and squeue shows."""
    digest = hashlib.sha256(str(point.folder.absolute()).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', point.name)[:80]}.{digest}"


def beside(point: Point, what: str) -> Path:
    return Path(point.runs_dir) / f".{point.name}.{what}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """The file, open to read and write, and to one process at a time."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def several(value: str | list[str] | None) -> list[str]:
    """A setting that is null, one or a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(one) for one in value]
