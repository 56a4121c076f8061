"""Starts a point as a Slurm job, by plain sbatch: this process submits it, waits, and returns its exit code.

Plain sbatch is used and not submitit, because a point is a command. submitit would send a serialised function to a
Python that must be the same on the node, poll by sacct, which needs accounting, and know neither how=gloo nor the
requeue in launch/inside.py. A script can also be read, and submitted again by hand.

The script `.<name>.sbatch` and the number of the job, `.<name>.job`, lie beside the point's folder in runs_dir. A job
that is queued or runs is joined and never submitted twice, also by another process or after Ctrl-C, which leaves jobs
alone. The job's name depends on the folder, so `--dependency=singleton` makes even two jobs for one folder run one
after the other. All that a run prints, in all its lives, is in launch.log in the point's folder.
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
from hvdllm.settings import several
from hvdllm.squeue import ENDED, ask, said, slurm

POLL_S = (0.5, 15.0)  # seconds between two questions to Slurm, at first and at most; each costs its controller a little
REQUEUE_S = 60  # seconds before the time limit, in which a run saves


def ready(settings: Slurm) -> None:
    """Does nothing, because Slurm itself says what it refuses."""


def room(settings: Slurm) -> int | None:
    """Any number, because Slurm has a queue of its own."""
    return None


def launch(point: Point, settings: Slurm, stop: threading.Event, say: Say) -> int:
    """Submits the point, or joins its job, and waits for its end, as base.Launcher says.

    Returns the exit code of the job, or 130 after Ctrl-C, when the job goes on.

    Raises UserError, with Slurm's own message, if Slurm refuses the job.
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
    """The number of this point's job, and whether it was submitted now. Of two processes only one submits.

    Raises UserError if Slurm refuses the job, or if it does not say whether an earlier one still runs.
    """
    with locked(beside(point, "job")) as file:
        job = file.read().strip()
        now = ask(job) if job else None
        if now is not None and now.state == "UNKNOWN":  # it may run, so a second job could be one too many
            raise UserError(f"Slurm does not say how job {job} of {point.name} is ({now.reason}): try again later")
        if now is not None and now.state not in ENDED and now.name == job_name(point):
            return job, False
        job = submit(point, settings)
        file.seek(0)
        file.truncate()
        file.write(f"{job}\n")
        return job, True


def submit(point: Point, settings: Slurm) -> str:
    """Writes the script and submits it. Returns the job's number. Raises UserError if Slurm refuses it."""
    script = beside(point, "sbatch")
    words = ["sbatch", "--parsable", *options(point, settings), str(script.absolute())]
    runs.write_whole(script, text_of(point, settings, words))
    done = slurm(words)
    if done.returncode:
        raise UserError(
            f"Slurm refuses {point.name} ({said(done.stderr)}): launch.partition, launch.account, launch.nodes and the "
            "other settings of launch=slurm change what is asked for, `sinfo` shows what there is"
        )
    return done.stdout.strip().split(";")[0]  # with several clusters it is NUMBER;CLUSTER


def options(point: Point, settings: Slurm) -> list[str]:
    """The options for sbatch. The user's own come last, so they win."""
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
    """The batch script. Its last line becomes launch/inside.py, which starts the ranks and handles the time limit."""
    inside = [*PYTHON, "hvdllm.launch.inside", "--how", settings.how]
    inside += ["--interface", settings.interface] if settings.interface else []
    # The comment must be one line, because a second one would be a command.
    lines = ["#!/bin/bash", f"# Submitted by: {' '.join(shlex.join(submitted).split())}"]
    if modules := several(settings.modules):
        lines += ["type module >/dev/null 2>&1 || . /etc/profile", f"module load {shlex.join(modules)} || exit 1"]
    lines.append(f"exec {shlex.join([*inside, '--', *command(point)])}")
    return "\n".join(lines) + "\n"


def finished(folder: Path) -> bool:
    """Whether the run in this folder has met its budget."""
    ends = [record for record in runs.records(folder) if record.get("kind") == "end"]
    return bool(ends) and ends[-1].get("reason") == "budget"


def job_name(point: Point) -> str:
    """The name of the job, which depends on the folder alone. `singleton` goes by it, and squeue shows it."""
    digest = hashlib.sha256(str(point.folder.absolute()).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', point.name)[:80]}.{digest}"


def beside(point: Point, what: str) -> Path:
    """A hidden file beside the point's folder."""
    return Path(point.runs_dir) / f".{point.name}.{what}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """A context with the file open for reading and writing, by one process at a time."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
