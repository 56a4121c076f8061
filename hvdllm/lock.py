"""The lock of a run's folder, in which one process trains at a time. The lock of a process that is gone is taken over.

The file `lock` is made with O_EXCL, which succeeds for only one process, also on NFS. It says who holds the lock, and
the holder touches it every BEAT_S seconds. The lock is stale, and the next process takes it over,

  on the same host       if no process with its pid and start time lives (in the same boot and pid namespace)
  in Slurm               if its job has ended, or if it was an earlier life of this job (a requeue on another node)
  elsewhere              if it was not touched for STALE_S seconds, by the clock of the file system itself
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import tempfile
import threading
import uuid
from pathlib import Path

from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.world.detect import started

NAME = "lock"
BEAT_S = 20.0
STALE_S = 180.0
LONGEST = 4096  # the most bytes that are read of a lock


class Lock:
    """The lock of a folder, which is made if it does not exist.

    Raises UserError if another process holds the lock, or if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._made = False
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except OSError as error:
            raise UserError(cannot_write(folder, error)) from None
        self._done = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def intact(self) -> bool:
        """Whether this process still holds it. It does not if the folder was removed, moved or taken over."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return False

    def close(self) -> None:
        """Releases the lock, and removes the folder if it was made for the lock and holds nothing else."""
        self._done.set()
        with contextlib.suppress(OSError):
            if self.intact():
                self.path.unlink()
            if self._made:
                self.folder.rmdir()
        os.close(self._file)

    # ------------------------------------------------------------------ inside
    def _take(self) -> int:
        mark = uuid.uuid4().hex
        while True:
            try:
                file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._clear(mark)
                continue
            os.write(file, json.dumps({**here(), "mark": mark}).encode() + b"\n")
            return file

    def _clear(self, mark: str) -> None:
        """Removes a stale lock. Raises UserError if the lock is not stale."""
        try:
            said = _read(self.path)
            age = _now(self.folder) - self.path.stat().st_mtime
        except FileNotFoundError:  # it has just been released
            return
        if not stale(said, age):
            raise UserError(in_use(self.folder, said))
        aside = self.path.with_name(f".{NAME}.{mark}")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
            if _read(aside) != said:  # another process was faster, and this is its new lock
                os.replace(aside, self.path)
                raise UserError(in_use(self.folder, _read(self.path)))
            aside.unlink()

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.intact():
                    os.utime(self.path)


def here() -> Json:
    """What a lock says of this process."""
    return {
        "host": socket.gethostname(), "boot": _text("/proc/sys/kernel/random/boot_id"), "pids": _pids(),
        "pid": os.getpid(), "started": started(os.getpid()), "job": os.environ.get("SLURM_JOB_ID"),
        "life": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": datetime.datetime.now().isoformat(" ", "seconds"),
    }  # fmt: skip


def stale(said: Json, age: float) -> bool:
    """Whether the holder of a lock is gone.

    Args:
        said: what the lock says.
        age: seconds since the lock was last touched.
    """
    me = here()
    if all(said.get(key) == me[key] for key in ("host", "boot", "pids")) and isinstance(said.get("pid"), int):
        return not _lives(said["pid"], said.get("started"))
    if age > STALE_S:
        return True
    job = said.get("job")
    if job is None or not str(job).isdecimal():
        return False
    if job == me["job"]:
        return bool(said.get("life") != me["life"])
    return _ended(str(job))


def held(folder: Path) -> bool:
    """Whether a process that may be alive holds the lock of a folder."""
    path = folder / NAME
    try:
        return not stale(_read(path), _now(folder) - path.stat().st_mtime)
    except OSError:
        return False


def cannot_write(folder: Path, error: OSError) -> str:
    """The sentence for a folder that cannot be written."""
    return f"cannot write to {folder} ({error.strerror or error}): choose another runs_dir, or make it writable"


def in_use(folder: Path, said: Json) -> str:
    """The sentence for a process that finds the folder locked."""
    job = f" (job {said['job']})" if str(said.get("job")).isdecimal() else ""
    pid, since = (json.dumps(said.get(key, "?")).strip('"') for key in ("pid", "since"))
    who = f"process {pid} on {json.dumps(said.get('host', '?'))}{job} has trained in it since {since}"
    return (
        f"{folder} is in use: {who}; wait until that has ended, or choose another name (where nothing runs any more, "
        f"delete {folder / NAME})"
    )


def _read(path: Path) -> Json:
    """What a lock says, or nothing if it is not JSON (yet)."""
    with open(path, "rb") as file:
        text = file.read(LONGEST)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _now(folder: Path) -> float:
    """The time by the clock that dates the lock, which may be that of a file server."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _lives(pid: int, since: object) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return bool(started(pid) == since)


def _pids() -> str:
    """The pid namespace, since the same pid is another process in another container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _ended(job: str) -> bool:
    """Whether a Slurm job has ended. False if Slurm does not say."""
    from hvdllm import squeue

    try:
        state = squeue.ask(job)
    except UserError:
        return False
    return state is None or state.state in squeue.ENDED
