"""Standard output and error, written with protection in this one place: output may be lost, never the work.

The reader of a pipe may go away (tee, a terminal behind ssh), a disk be full, a service start us with its outputs
closed, and a terminal may not know a letter.
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
    """A stream that raises nothing when it is written to. lost: did something not arrive?"""

    def __init__(self, stream: Any) -> None:
        self._stream, self.lost = stream, False
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is a question mark

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
            # What is in its buffer would be tried again, at the latest when Python ends.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def spared() -> Iterator[Spared]:
    """Within, sys.stdout and sys.stderr are spared; yields the first."""
    for number in (0, 1, 2):  # a file that is opened later must not become a closed output
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
    """The standard output of horovodrun or mpirun, where that is on this machine and a terminal or a pipe: it puts a
    prefix before every line of its ranks, and gives them no terminal. launcher: the processes up to it, the nearest
    first. TERMINAL is that of `train launch=horovodrun`, which keeps what the launcher prints. None: write to our
    own."""
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
    os.close(number)  # of a file we would not know where its end is
    return None


def _is_launcher(pid: int) -> bool:
    """Not what may stand above it, such as Slurm's own, whose output is another."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")[:2]
    except OSError:
        return False
    return any(os.path.basename(word) in ("horovodrun", "mpirun", "mpiexec", "orterun") for word in words)
