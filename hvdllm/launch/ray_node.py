"""What stands on a node of a Ray cluster for each rank: an actor, and under it a process that keeps the rank.

Ray ends an actor when its driver is gone, and kills the actor's children with it. The rank must have time to save, and
no process may stay behind. So the actor's child is not the rank but its keeper, which is this module as a program:

    driver ... actor - keeper - rank, in a session of its own

If the keeper is killed, the kernel sends SIGTERM to the rank (launch/local.py), which saves and ends; also, the rank
watches its ancestors (world/signals.py), and ends some seconds after one of them has gone. If only the actor dies, the
keeper reads the end of its standard input, and asks the rank to save and end.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from hvdllm import untrusted
from hvdllm.interpreter import PYTHON
from hvdllm.launch import group, local, network

PACKAGES = ("hvdllm", "torch", "horovod")  # of which all nodes must have the same version
MOST_WAITING = 1000  # lines that wait for the driver; the rank waits when there are more
SAVE_S = 12.0  # seconds that a rank has to save, a little more than it gives itself once its launcher is gone
TOKEN = 64  # the most bytes of a token file


class Place:
    """An actor of Ray: the place of one rank. Its methods run in threads, so that `news` may wait."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque()
        self.changed = threading.Condition()
        self.process: subprocess.Popen[bytes] | None = None
        self.code: int | None = None

    def look(self, cwd: str, token: str) -> dict[str, str]:
        """What the driver must know of this node: its versions, what it finds in the token file, and its GPUs."""
        try:
            read = untrusted.read(Path(token), TOKEN).decode(errors="replace")
        except (OSError, untrusted.Unfit):
            read = ""
        return {
            **versions(),
            "cwd": cwd if os.path.isdir(cwd) else "",
            "token": read,
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }

    def start(self, words: Sequence[str], env: Mapping[str, str], cwd: str, towards: str) -> None:
        """Starts the rank.

        Args:
            words: its command line, without the interpreter.
            env: variables beside those of this node.
            cwd: the folder in which it starts.
            towards: the address of the driver's host.
        """
        env = {**group.environment(), **env}
        env |= network.for_gloo(env, towards)
        python = (sys.executable, *PYTHON[1:])
        self.process = subprocess.Popen(
            [*python, "hvdllm.launch.ray_node", *python, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def news(self, wait_s: float) -> tuple[list[str], int | None]:
        """The lines that the rank has printed since the last call, and its exit code if it has ended. Waits until there
        is something of both, or until wait_s seconds have passed."""
        with self.changed:
            self.changed.wait_for(lambda: bool(self.lines) or self.code is not None, wait_s)
            lines = list(self.lines)
            self.lines.clear()
            self.changed.notify_all()
            return lines, self.code

    def ask(self) -> None:
        """Asks the rank to save and end; the second time it is ended at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while line := process.stdout.readline(untrusted.MOST_LINE):
            with self.changed:
                self.changed.wait_for(lambda: len(self.lines) < MOST_WAITING)
                self.lines.append(line.decode(errors="replace"))
                self.changed.notify_all()
        code = process.wait()
        with self.changed:
            self.code = code if code >= 0 else 128 - code
            self.changed.notify_all()


def versions() -> dict[str, str]:
    """The versions that must be the same on all nodes."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def keep(words: list[str]) -> int:
    """Runs a rank to its end, and returns its exit code.

    SIGTERM, or the end of standard input, asks it to save and end. A second SIGTERM ends it at once, and so do SAVE_S
    seconds after the end of standard input.
    """
    stop = threading.Event()

    def hear(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a third must not disturb the end
            raise KeyboardInterrupt
        stop.set()

    def until_alone() -> None:
        while os.read(0, 1):
            pass
        if not stop.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(SAVE_S)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, hear)
    threading.Thread(target=until_alone, name="until-alone", daemon=True).start()
    try:
        return local.kept(words, os.environ, 1, stop, lambda pid, mark: local.ask([pid]))
    except KeyboardInterrupt:
        return 128 + signal.SIGKILL
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else one that comes now would be this process's exit code


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
