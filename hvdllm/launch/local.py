"""A point as a process of this machine; and how launchers that stay here start, ask and end what they start.

Invariant: when run() returns, or raises, none of the processes it started is left; when this process is killed, the
kernel sends them SIGTERM, at which a run saves and ends, and horovodrun ends its ranks. Processes are found by a mark
in their environment, which also those have that lost their parent (as the ranks of mpirun do).
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
GRACE_S = 3.0  # that what is left of a job has to end by itself, once its launcher has
KILL_S = 10.0  # longest wait for processes after SIGKILL: one that hangs in the kernel is left to it
PDEATHSIG = 1  # linux/prctl.h
_marks: set[str] = set()  # of what runs now


def ready(settings: Launch) -> None:
    """Nothing need be there."""


def launch(point: Point, settings: Launch, stop: threading.Event, say: Say) -> int:
    """The point as one process; asked by SIGTERM to save and to end."""
    from hvdllm.launch.base import command

    return run(command(point), os.environ, point.folder / "launch.log", stop, lambda pid, mark: ask([pid]))


def run(
    words: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    stop: threading.Event,
    ask: Callable[[int, str], None],
) -> int:
    """Runs a command to its end, its output at the end of `log`, and returns its code (128 + the signal that ended it).

    ask(pid, mark): called once when stop is set. It may take as long as it takes: end_all() is for the impatient.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError as error:
        raise UserError(cannot_write(log.parent, error)) from None
    mark = uuid.uuid4().hex
    # The thread that starts a process is the parent whose death the kernel tells it of: it waits here.
    tied = [*PYTHON, "hvdllm.launch.local", str(os.getpid()), *words]
    _marks.add(mark)
    try:
        with appended_to(log) as file:
            process = subprocess.Popen(
                tied, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
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
    """Raises UserError where the log is a link, which a folder of somebody else's may have laid anywhere."""
    try:
        return untrusted.appended(log)
    except untrusted.Unfit as error:
        raise UserError(f"{log} {error}: delete it, or choose another name") from None


def ask(pids: Sequence[int]) -> None:
    """SIGTERM: to a run the ask to save and to end."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def end_all() -> None:
    """At once, everything that run() has started in this process; its callers then return."""
    for mark in list(_marks):
        end(mark, 0.0)


def end(mark: str, grace_s: float) -> None:
    """Waits grace_s for a family to end by itself, then ends it by SIGKILL."""
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
    """Living processes with this mark, and the environment each was started with."""
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
    with contextlib.suppress(AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("who started this is gone")
    os.execvp(words[0], words)


if __name__ == "__main__":
    _tied_to(int(sys.argv[1]), sys.argv[2:])
