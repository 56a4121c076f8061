"""The side channel of the heartbeats: a folder within the run's folder, which all hosts share already.

It needs no port, no interface and no secret, and works the same under Horovod, MPI and torch. It is new for each life
of a run and removed at its end:

    beats-<life>/<rank>        where the rank is (pulse.py), rewritten in place twice a second by a thread of its own
    beats-<life>/<rank>.lock   is locked as long as the rank's process lives. The kernel releases the lock of a process
                               that is gone, however it ended, and keeps that of one that was only stopped
    beats-<life>/<rank>.fatal  what Python writes when it crashes, by a segmentation fault for example
    beats-<life>/verdict-<n>   what has happened. The first rank to make the file has found it, and all act on it

Where a file system has no locks across hosts, or a disk no room, silence alone counts. Ranks of one host also share
memory in which each sees exactly where the other is, or was when its process ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hvdllm import lock, untrusted
from hvdllm.pulse import PAGE, Place, Pulse
from hvdllm.trainer.judge import Beat

SIZE = 1024  # bytes of a beat, always as many, so that a full disk has room for it
MOST = 16 * 2**10  # the most bytes of any other file here


@dataclass(frozen=True)
class Peer:
    """A process as it has described itself to the others over the world's own collectives, when the run began.

    Attributes:
        host: the name of its host.
        where: what identifies host, boot and pid namespace.
        pid, started: the process.
        locks: whether it could lock its file.
        page: the descriptor of its page (pulse.py), or -1.
    """

    host: str
    where: str
    pid: int
    started: str
    locks: bool
    page: int

    @property
    def here(self) -> bool:
        """Whether it is on the host, and in the container, of this process."""
        return self.where == where()


@dataclass(frozen=True)
class Verdict:
    """What has happened.

    Attributes:
        rank: of which rank.
        hang: whether it stands still; otherwise it has failed or is gone.
        text: one line for the user.
    """

    rank: int
    hang: bool
    text: str


class Channel:
    """The files of one life of a run, as one rank uses them.

    Args:
        folder: of this life.
        rank: this rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.locks = False
        self._lock = -1
        with contextlib.suppress(OSError):  # then the other ranks hear nothing of this one
            self._lock = os.open(folder / f"{rank}.lock", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locks = True
        self._fatal: IO[str] | None = None
        if not faulthandler.is_enabled():
            with contextlib.suppress(OSError):
                self._fatal = open(folder / f"{rank}.fatal", "w")  # noqa: SIM115 - closed by `close`
                faulthandler.enable(self._fatal)

    def close(self) -> None:
        """Releases the lock."""
        if self._fatal is not None:
            faulthandler.disable()
            self._fatal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def tell(self, beat: Beat) -> None:
        """Writes this rank's beat over its last one. Raises OSError if the disk refuses."""
        words = beat.words
        while len(text := json.dumps(dataclasses.asdict(dataclasses.replace(beat, words=words)))) > SIZE:
            words = words[: len(words) // 2]
        text = text.ljust(SIZE)
        # It is closed each time, which is what makes it visible to other hosts over NFS.
        file = os.open(self.folder / str(self.rank), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(file, text.encode(), 0)
        finally:
            os.close(file)

    def heard(self, rank: int) -> Beat | None:
        """What a rank tells, or None if nothing can be read."""
        try:
            said = untrusted.read_json(self.folder / str(rank), SIZE)
            place = Place(**said.pop("place"))
            waits = place.waits is None or isinstance(place.waits, str)
            if not (waits and isinstance(place.phase, str) and isinstance(place.limit_s, int | float)):
                return None
            return Beat(**said, place=place)
        except (OSError, untrusted.Unfit, TypeError, AttributeError, KeyError):
            return None

    def gone(self, rank: int) -> bool:
        """Whether the process of a rank is gone: whether its lock can be had."""
        try:
            file = os.open(self.folder / f"{rank}.lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released as the file is closed
            return True
        except OSError:
            return False
        finally:
            os.close(file)

    def fatal(self, rank: int) -> str:
        """What Python wrote when this rank's process crashed, or ""."""
        with contextlib.suppress(OSError, untrusted.Unfit):
            return untrusted.read(self.folder / f"{rank}.fatal", MOST).decode(errors="replace")
        return ""

    def claim(self, name: str, text: str) -> bool:
        """Makes a file with this text. False if it is there already; the first rank alone gets True."""
        beside = self.folder / f".{name}.{self.rank}"
        try:
            beside.write_text(text)
            os.link(beside, self.folder / name)  # whole, or not at all
        except OSError:
            return False
        finally:
            beside.unlink(missing_ok=True)  # or it would be written to again as the file that was made
        return True

    def verdict(self, number: int) -> Verdict | None:
        """The verdict of this number, if there is one."""
        with contextlib.suppress(OSError, untrusted.Unfit, TypeError):
            return Verdict(**untrusted.read_json(self.folder / f"verdict-{number}", MOST))
        return None


def where() -> str:
    said = lock.here()
    return " ".join(str(said[key]) for key in ("host", "boot", "pids"))


def page_of(rhythm: Pulse) -> int:
    """Makes the memory in which other ranks of this host see where this one is. Returns its descriptor, or -1."""
    try:
        page = os.memfd_create("hvdllm-pulse")
        os.write(page, bytes(PAGE.size))
        rhythm.page = mmap.mmap(page, PAGE.size)
    except (OSError, AttributeError):  # this is not Linux
        return -1
    return page


def opened(peer: Peer) -> int | None:
    """A descriptor of a rank's page, or None if it is on another host."""
    if peer.page < 0 or not peer.here:
        return None
    try:
        return os.open(f"/proc/{peer.pid}/fd/{peer.page}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
