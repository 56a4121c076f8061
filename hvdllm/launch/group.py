"""Runs a group of processes that start and end together, and keeps their last lines of output."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdllm.interpreter import found

GRACE_S = 8.0  # seconds between SIGTERM and SIGKILL; horovodrun takes 5 to end its ranks
FOREIGN = ("HOROVOD_", "OMPI_", "PMIX_", "SLURM_", "TORCHELASTIC_", "OMP_")  # variables of other launchers


@dataclass(frozen=True)
class Ended:
    """How a group ended.

    Attributes:
        problem: what went wrong, as a clause, or None if all processes returned 0.
        tail: the last lines of all output.
    """

    problem: str | None
    tail: list[str]


def environment(**more: str) -> dict[str, str]:
    """The environment of this process, with `more`, and without variables by which a rank detects a launcher."""
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | found() | more


def run(commands: Sequence[Sequence[str]], env: Mapping[str, str], log: Path, limit_s: float) -> Ended:
    """Runs processes side by side to their end. If one fails, all are ended.

    No process is left when this returns or raises, also after Ctrl-C. A signal has its usual effect afterwards.

    Args:
        commands: one for each process.
        env: their environment.
        log: the file for their output.
        limit_s: the most seconds that they may take.
    """
    started: list[subprocess.Popen[bytes]] = []
    problem, end = None, time.monotonic() + limit_s
    with noted() as heard, open(log, "wb") as file:
        try:
            for command in commands:
                started.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(env),
                        start_new_session=True,
                    )
                )  # fmt: skip
            while problem is None and not heard:
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
            _end(started)
    return Ended(problem, last_lines(log.read_text(errors="replace")))


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """A context in which SIGINT, SIGTERM and SIGHUP interrupt nothing, and are noted. The first arrives at its end.

    An exception from a signal handler can leave a Popen locked for ever (CPython's Popen.poll), or come between the
    start of a process and its name in our list. A mask does not prevent that, since another thread may get the signal.
    """
    heard: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object] | int] = {}
    if threading.current_thread() is threading.main_thread():  # no other thread runs handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:
                before[number] = handler
                signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield heard
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if heard:
            signal.raise_signal(heard[0])


def last_lines(text: str, most: int = 12) -> list[str]:
    """The last lines of an output that say why it ended. If ranks have printed lines, the launcher's are left out."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    ranks = [line for line in lines if re.match(r"\[\d+\]<std(out|err)>:", line)]
    return (ranks or lines)[-most:]


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Sends SIGTERM, which launchers pass on to their ranks, and then SIGKILL to all descendants that are left."""
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
    """The living processes among `roots` and their descendants, as a map from pid to start time.

    The start time tells a process from a later one with the same pid.
    """
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
    """The start time of a process in clock ticks, or "" if it is gone or a zombie."""
    fields = _stat(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on, or nothing if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
