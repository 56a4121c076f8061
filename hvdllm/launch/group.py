"""Processes that belong together: started at once, ended together, their last words kept."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdllm.interpreter import found
from hvdllm.launch.lab import held

GRACE_S = 8.0  # seconds between SIGTERM and SIGKILL: horovodrun takes 5 to end its ranks
FOREIGN = ("HOROVOD_", "OMPI_", "PMIX_", "SLURM_", "TORCHELASTIC_", "OMP_")  # what another launcher left in here


@dataclass(frozen=True)
class Ended:
    """problem: None where all returned 0, else half a sentence. tail: the last lines of all output."""

    problem: str | None
    tail: list[str]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would tell a rank that another launcher started it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | found() | more


def run(commands: Sequence[Sequence[str]], env: Mapping[str, str], log: Path, limit_s: float) -> Ended:
    """Runs them side by side to their end, at most limit_s seconds; their output goes to `log`.

    One that fails ends all. Whatever happens, Ctrl-C included, no process of them is left.
    """
    started: list[subprocess.Popen[bytes]] = []
    problem, end = None, time.monotonic() + limit_s
    with open(log, "wb") as file:
        try:
            for command in commands:
                started.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(env),
                        start_new_session=True,
                    )
                )  # fmt: skip
            while problem is None:
                codes = [process.poll() for process in started]
                if any(codes):
                    problem = f"ended with code {next(filter(None, codes))}"
                elif None not in codes:
                    break
                elif time.monotonic() > end:
                    problem = f"was not done after {limit_s:.0f} s (--limit)"
                else:
                    time.sleep(0.05)
        finally:
            with held():
                _end(started)
    return Ended(problem, last_lines(log.read_text(errors="replace")))


def last_lines(text: str, most: int = 12) -> list[str]:
    """The lines that say why: the launcher's own traceback is left out where ranks have spoken."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    ranks = [line for line in lines if re.match(r"\[\d+\]<std(out|err)>:", line)]
    return (ranks or lines)[-most:]


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, which launchers pass on to their ranks, then SIGKILL to whatever descends from them."""
    alive = [process for process in started if process.poll() is None]
    family = descendants([process.pid for process in alive])
    for process in alive:
        process.terminate()
    end = time.monotonic() + GRACE_S
    for process in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for pid, began in family.items():
        if _living(pid) == began:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in alive:
        process.wait()
    end = time.monotonic() + GRACE_S
    while any(_living(pid) == began for pid, began in family.items()) and time.monotonic() < end:
        time.sleep(0.01)


def descendants(roots: Sequence[int]) -> dict[int, str]:
    """Living processes below and including `roots`, with their start times, so that a pid used again is not one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = {}, list(roots)
    while todo:
        pid = todo.pop()
        if began := _living(pid):
            found[pid] = began
            todo += children.get(pid, [])
    return found


def _living(pid: int) -> str:
    """Start time in clock ticks; empty if gone, or a zombie that its parent has not asked for."""
    fields = _stat(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str]:
    """State, parent and what follows in /proc/<pid>/stat; empty if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
