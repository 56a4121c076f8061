"""Ctrl-C, SIGTERM and a launcher that is gone, as asks that every rank will hear of.

SIGINT, SIGTERM and SIGHUP ask for a checkpoint and an end, SIGUSR1 for a checkpoint alone. The handlers only set a
flag: the next meta takes it along, and all ranks act on it at the same mark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

from hvdllm.world.base import Asks
from hvdllm.world.detect import started

LAUNCHERS = {
    "horovodrun",
    "meeting.py",  # of launch/: the same with a meeting point of ours
    "torchrun",
    "torch.distributed.run",
    "mpirun",
    "mpiexec",
    "orterun",
    "orted",
    "prte",
    "prted",
    "prterun",
    "srun",
    "slurmstepd",
}
GRACE_S = 10.0  # seconds to save in, once the launcher is gone
TERMINATED = threading.Event()  # set by SIGTERM: whoever started this process is ending it already


def listen(asks: Asks, alone: bool) -> None:
    """Takes over SIGINT, SIGTERM, SIGHUP and SIGUSR1. `alone`: a second Ctrl-C ends the process at once."""

    asked = False  # asks.stop is cleared when a meta takes it along

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGTERM:
            TERMINATED.set()
        if alone and asked and number == signal.SIGINT:
            deafen()
            raise KeyboardInterrupt
        asked = asks.stop = asks.save = True
        if alone and number == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping at the next mark, with a checkpoint; Ctrl-C again ends at once\n")

    def save(number: int, frame: FrameType | None) -> None:
        asks.save = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, save)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal is gone; nohup would have it ignored
        signal.signal(signal.SIGHUP, stop)


def deafen() -> None:
    """Signals mean again what they mean to any process: a run that has failed must not outlive its launcher."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def watch_launcher(asks: Asks) -> None:
    """A thread that asks for a stop when the launcher is gone, and ends the process GRACE_S later.

    A launcher killed by SIGKILL tells nobody: its ranks would train on, or wait for each other, unseen.
    """
    watched = up_to_launcher()

    def watch() -> None:
        while all(started(pid) == at for pid, at in watched.items()):
            time.sleep(1.0)
        asks.stop = asks.save = True
        time.sleep(GRACE_S)
        os._exit(1)

    if watched:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def up_to_launcher() -> dict[int, str]:
    """The ancestors up to the topmost launcher, as pid: start time; those above it (a shell) may well end before us.

    On a remote host the chain ends at the first sshd, which lives as long as the launcher's connection.
    """
    chain: list[tuple[int, str]] = []
    keep = 0
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")[:3]
        except OSError:
            break
        # The first word of each: horovodrun --mpi becomes `/bin/sh -c "mpirun ..."`.
        names = {os.path.basename(word.split(" ", 1)[0]) for word in words}
        chain.append((pid, started(pid)))
        if names & LAUNCHERS:
            keep = len(chain)
        elif any(name.startswith("sshd") for name in names):
            keep = keep or len(chain)
            break
        pid = parent
    return dict(chain[:keep])
