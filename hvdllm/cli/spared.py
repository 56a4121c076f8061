"""Standard output and error that never raise, so that output may be lost, but never the work.

The reader of a pipe may go away (tee, a terminal behind ssh), a disk may be full, a service may start this process with
closed outputs, and a terminal may not be able to show a character.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hvdllm.launch.base import TERMINAL


class Spared:
    """A stream that does not raise when it is written to.

    Attributes:
        lost: whether some output could not be written.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self.lost = stream, False
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a question mark for what a terminal cannot show

    def write(self, text: str) -> int:
        with self._sparing():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._sparing():
            self._stream.flush()

    def isatty(self) -> bool:
        found = False
        with self._sparing():
            found = bool(self._stream.isatty())
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _sparing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: it is closed
            self.lost = True
            # The stream would try to write its buffer again, at the latest when Python ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def spared() -> Iterator[Spared]:
    """A context in which sys.stdout and sys.stderr are Spared. Yields the first."""
    for number in (0, 1, 2):  # otherwise a file that is opened later would get the number of a closed output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    streams = [Spared(stream if stream is not None else open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = streams
    try:
        yield streams[0]
    finally:
        sys.stdout, sys.stderr = before


def of_launcher(launcher: Sequence[int]) -> Spared | None:
    """The standard output of the launcher that started this rank, if it can be written to directly.

    horovodrun and mpirun put a prefix before each line of their ranks, and give them no terminal. So a rank writes to
    the launcher's own output, if that is on this machine and is a terminal or a pipe. Under `train launch=horovodrun`,
    which keeps what the launcher prints, it is the user's terminal (TERMINAL).

    Args:
        launcher: the pids of the ancestors up to the launcher, the nearest first.

    Returns None if the rank should write to its own standard output.
    """
    found = [pid for pid in launcher if _is_launcher(pid)]
    if not found:
        return None
    path = os.environ.get(TERMINAL) or f"/proc/{found[-1]}/fd/1"
    try:
        number = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    if os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode):
        os.set_blocking(number, True)
        return Spared(open(number, "w", encoding="utf-8", errors="replace"))
    os.close(number)  # it is a file, whose end another process moves
    return None


def _is_launcher(pid: int) -> bool:
    """Whether a process is horovodrun or mpirun, and not one above it such as Slurm's, which has another output."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")[:2]
    except OSError:
        return False
    return any(os.path.basename(word) in ("horovodrun", "mpirun", "mpiexec", "orterun") for word in words)
