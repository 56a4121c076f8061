"""Who trains in a run's folder: one process at a time; the lock of one that is gone clears itself.

`lock` in the folder is made by O_EXCL, at which one process alone succeeds, also on NFS; its content says who holds it,
and the holder touches it every BEAT_S. It is stale, and the next process takes it over, where

  on the same host       no process of that pid and start time lives (the same boot and the same pid namespace)
  in Slurm               its job has ended, or it is ours in an earlier life (a requeue on another node)
  elsewhere              it was not touched for STALE_S, by the clock of the file system itself
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
LONGEST = 4096  # bytes that are read of a lock


class Lock:
    """Of one folder, which is made where it is not there. Raises UserError where another process holds it, or the
    folder cannot be written."""

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
        """Is it still there and ours? It is not where the folder was removed or moved, or another process took it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return False

    def close(self) -> None:
        """Gives it back; a folder that was made for it and has nothing else in it goes too."""
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
        """Takes a stale lock away. Raises UserError where it is none."""
        try:
            said = _read(self.path)
            age = _now(self.folder) - self.path.stat().st_mtime
        except FileNotFoundError:  # just given back
            return
        if not stale(said, age):
            raise UserError(in_use(self.folder, said))
        aside = self.path.with_name(f".{NAME}.{mark}")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
            if _read(aside) != said:  # another process was faster, and this is its lock
                os.replace(aside, self.path)
                raise UserError(in_use(self.folder, _read(self.path)))
            aside.unlink()

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.intact():
                    os.utime(self.path)


def here() -> Json:
    """This process, as a lock names it."""
    return {
        "host": socket.gethostname(), "boot": _text("/proc/sys/kernel/random/boot_id"), "pids": _pids(),
        "pid": os.getpid(), "started": started(os.getpid()), "job": os.environ.get("SLURM_JOB_ID"),
        "life": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": datetime.datetime.now().isoformat(" ", "seconds"),
    }  # fmt: skip


def stale(said: Json, age: float) -> bool:
    """Is the holder gone? age: seconds since it last touched its lock."""
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


def cannot_write(folder: Path, error: OSError) -> str:
    return f"cannot write to {folder} ({error.strerror or error}): choose another runs_dir, or make it writable"


def in_use(folder: Path, said: Json) -> str:
    """The sentence for whoever comes second."""
    job = f" (job {said['job']})" if str(said.get("job")).isdecimal() else ""
    pid, since = (json.dumps(said.get(key, "?")).strip('"') for key in ("pid", "since"))
    who = f"process {pid} on {json.dumps(said.get('host', '?'))}{job} has trained in it since {since}"
    return (
        f"{folder} is in use: {who}; wait until that has ended, or choose another name (where nothing runs any more, "
        f"delete {folder / NAME})"
    )


def _read(path: Path) -> Json:
    """What a lock says; nothing where that is no JSON (yet)."""
    with open(path, "rb") as file:
        text = file.read(LONGEST)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _now(folder: Path) -> float:
    """By the clock that a touch of the lock goes by, which may be a file server's."""
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
    """The pid namespace: in another container a pid is another process."""
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
    """Has this Slurm job ended? False where Slurm does not say."""
    from hvdllm import squeue

    try:
        state = squeue.ask(job)
    except UserError:
        return False
    return state is None or state.state in squeue.ENDED
