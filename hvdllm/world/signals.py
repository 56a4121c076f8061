"""Turns signals, and the loss of the launcher, into asks that all ranks will act on.

SIGINT, SIGTERM and SIGHUP ask for a checkpoint and an end, SIGUSR1 for a checkpoint alone. The handlers only set a
flag. The next meta takes it along, and all ranks act on it at the same mark.
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
    "meeting.py",  # launch/meeting.py is horovodrun with another meeting point
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
    "raylet",  # the parent of Ray's actors, under which launch=ray keeps ranks
}
GRACE_S = 10.0  # seconds that are left to save once the launcher is gone
TERMINATED = threading.Event()  # set by SIGTERM, with which the launcher has begun to end this process


def listen(asks: Asks, alone: bool) -> None:
    """Handles SIGINT, SIGTERM, SIGHUP and SIGUSR1.

    Args:
        asks: where the handlers note what is asked.
        alone: this process has no launcher, so a second Ctrl-C ends it at once.
    """

    asked = False  # kept here, because asks.stop is cleared when a meta takes it along

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
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, stop)


def deafen() -> None:
    """Restores the default action of all these signals, because a run that has failed must not outlive its launcher."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def watch_launcher(asks: Asks) -> None:
    """Starts a thread that asks for a stop when the launcher is gone, and ends the process GRACE_S seconds later.

    A launcher that was killed by SIGKILL tells no rank. Its ranks would train on, or wait for each other, unnoticed.
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
    """The ancestors of this process up to the topmost launcher, as a map from pid to start time.

    Ancestors above the launcher, such as a shell, may end before this process. On a remote host the chain ends at the
    first sshd, which lives as long as the launcher's connection.
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
        # Only the first word of each counts, since horovodrun --mpi becomes `/bin/sh -c "mpirun ..."`.
        names = {os.path.basename(word.split(" ", 1)[0]) for word in words}
        chain.append((pid, started(pid)))
        if names & LAUNCHERS:
            keep = len(chain)
        elif any(name.startswith("sshd") for name in names):
            keep = keep or len(chain)
            break
        pid = parent
    return dict(chain[:keep])
