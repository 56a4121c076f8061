"""Starts a point as a process of this machine; other launchers start and end their processes here by the same means.

Invariant: when run() returns or raises, none of the processes that it started is left. If this process is killed, the
kernel sends them SIGTERM, at which a run saves and ends, and horovodrun ends its ranks. Processes are found by a mark
in their environment, which processes keep when they lose their parent, as the ranks of mpirun do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.interpreter import PYTHON, found
from hvdllm.launch.base import Point, Say
from hvdllm.launch.parts import Launch
from hvdllm.lock import cannot_write

MARK = "HVDLLM_FAMILY"
POLL_S = 0.1
GRACE_S = 3.0  # seconds that processes of a job have to end by themselves after their launcher has ended
KILL_S = 10.0  # longest wait after SIGKILL; a process that hangs in the kernel is left alone then
PDEATHSIG = 1  # linux/prctl.h
_marks: set[str] = set()  # the marks of what runs now


def ready(settings: Launch) -> None:
    """Does nothing, because this launcher needs nothing."""


def room(settings: Launch) -> int | None:
    """One, because points share the cores of this machine."""
    return 1


def launch(point: Point, settings: Launch, stop: threading.Event, say: Say) -> int:
    """Runs the point as one process, as base.Launcher says. SIGTERM asks it to save and end."""
    from hvdllm.launch.base import command

    return run(command(point), os.environ, point.folder / "launch.log", stop, lambda pid, mark: ask([pid]))


def run(
    words: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    stop: threading.Event,
    ask: Callable[[int, str], None],
) -> int:
    """Runs a command to its end.

    Args:
        words: the command.
        env: its environment.
        log: the file to which its output is appended.
        stop: asks for an early end when it is set.
        ask: is then called once, with the pid and the mark, and asks the processes to end. How long they take is not
          limited; end_all() ends them at once.

    Returns its exit code, which is 128 + the signal that ended it.

    Raises UserError if the log cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError as error:
        raise UserError(cannot_write(log.parent, error)) from None
    with appended_to(log) as file:
        return kept(words, env, file, stop, ask)


def kept(
    words: Sequence[str],
    env: Mapping[str, str],
    out: TextIO | int,
    stop: threading.Event,
    ask: Callable[[int, str], None],
) -> int:
    """What run() does, with the output of the command going to an open file, or to a file descriptor."""
    mark = uuid.uuid4().hex
    # The kernel watches the thread that starts the process, not the whole parent; that thread waits here.
    tied = [*PYTHON, "hvdllm.launch.local", str(os.getpid()), *words]
    _marks.add(mark)
    try:
        process = subprocess.Popen(
            tied, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env={**env, **found(), MARK: mark}, start_new_session=True,
        )  # fmt: skip
        asked = False
        try:
            while process.poll() is None:
                if stop.is_set() and not asked:
                    asked = True
                    ask(process.pid, mark)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            end(mark, GRACE_S if process.poll() is not None else 0.0)
            process.wait()
        return process.returncode if process.returncode >= 0 else 128 - process.returncode
    finally:
        _marks.discard(mark)


def appended_to(log: Path) -> TextIO:
    """Opens a log for appending. Raises UserError if it is a link, which in a stranger's folder could lead anywhere."""
    try:
        return untrusted.appended(log)
    except untrusted.Unfit as error:
        raise UserError(f"{log} {error}: delete it, or choose another name") from None


def ask(pids: Sequence[int]) -> None:
    """Asks processes to save and end, by SIGTERM."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def end_all() -> None:
    """Ends at once everything that run() has started in this process. The calls of run() then return."""
    for mark in list(_marks):
        end(mark, 0.0)


def end(mark: str, grace_s: float) -> None:
    """Waits grace_s seconds for the processes with this mark to end by themselves, then ends them by SIGKILL."""
    began = time.monotonic()
    while left := family(mark):
        if time.monotonic() - began > grace_s:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if time.monotonic() - began > grace_s + KILL_S:
            return
        time.sleep(0.02)


def family(mark: str) -> dict[int, dict[str, str]]:
    """The living processes with this mark, as a map from pid to the environment that each was started with."""
    found = {}
    sign = f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            env = Path("/proc", entry, "environ").read_bytes() if entry.isdigit() else b""
            if sign in env and Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                pairs = (word.partition("=") for word in env.decode(errors="replace").split("\0"))
                found[int(entry)] = {key: value for key, _, value in pairs}
    return found


def _tied_to(parent: int, words: list[str]) -> None:
    """Becomes the command, which gets SIGTERM when its parent dies."""
    with contextlib.suppress(AttributeError):  # only Linux has prctl
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("who started this is gone")
    os.execvp(words[0], words)


if __name__ == "__main__":
    _tied_to(int(sys.argv[1]), sys.argv[2:])
