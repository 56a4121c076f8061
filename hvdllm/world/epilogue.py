"""Says the last word: prints a sentence once the launcher has ended, below the traceback that the launcher prints.

A launcher such as horovodrun or torchrun prints twenty lines of its own when a rank has failed, and a user reads the
last ones. So the rank that knows what has happened starts this module as a program. It lives on its own, waits until
the launcher is gone, and writes to the launcher's standard error. Where the launcher is on another host, or its output
cannot be opened, nothing is started. As a program it imports nothing of hvdllm.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import time

LONGEST_S = 90.0  # torchrun gives its ranks half a minute to end
POLL_S = 0.02


def launcher(ancestors: dict[int, str]) -> tuple[int, str] | None:
    """The topmost launcher that prints where its user reads, as its pid and start time; None if there is none here.

    Args:
        ancestors: the processes up to the launcher and their start times (signals.up_to_launcher), the nearest first.
    """
    return next(((pid, since) for pid, since in reversed(ancestors.items()) if _prints(pid)), None)


def start(sentence: str, pid: int, since: str) -> bool:
    """Starts the program. Returns False if the launcher's output cannot be written to.

    Args:
        sentence: one line, which holds no control characters.
        pid, since: the launcher and its start time.
    """
    try:
        out = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        os.set_blocking(out, True)
        mode = os.fstat(out).st_mode
        if not (os.isatty(out) or stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
            return False
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 2)]
        os.posix_spawn(
            sys.executable, [sys.executable, "-I", "-S", __file__, str(pid), since, sentence], os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, out, 1), *nowhere], setsid=True,
        )  # fmt: skip
    except OSError:
        return False
    finally:
        os.close(out)
    return True


def _prints(pid: int) -> bool:
    """Whether a process is a launcher that prints where its user reads. Ranks of srun descend from a daemon."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")[:4]
    except OSError:
        return False
    names = {os.path.basename(word) for word in words}
    return bool(
        names
        & {"horovodrun", "meeting.py", "mpirun", "mpiexec", "orterun", "prterun", "torchrun", "torch.distributed.run"}
    )


def main(pid: str, since: str, sentence: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher ends all that descends from it
    end = time.monotonic() + LONGEST_S
    while _started(pid) == since and time.monotonic() < end:
        time.sleep(POLL_S)
    os.write(1, f"{sentence}\n".encode())


def _started(pid: str) -> str:
    """As world/detect.py has it, which cannot be imported here."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


if __name__ == "__main__":
    main(*sys.argv[1:])
