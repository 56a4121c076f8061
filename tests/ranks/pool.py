"""A fork server for real ranks: it has imported torch, Horovod and hvdllm once, and every rank is a fork of it.

Nine tenths of a start of two ranks under horovodrun are imports. Here a rank begins where these are done and is in all
else the process that a launcher starts: it has a session, an environment, a command line (sys.argv) and an output of
its own, meets the others over Gloo, MPI or torch, is killed and interrupted by signals, and ends with its exit code.
What differs:

    /proc/PID/environ and /proc/PID/cmdline are those of the server (Job.pids() in tests/launch.py knows the ranks)
    all ranks hash strings with the same seed
    what the program would import lazily may be imported already
    a rank does not take the interpreter down at its end, once its threads and exit handlers are done

Between the server and the ranks of a job stands one more fork, which ends them when whoever asked for them is gone:

    alone   one process; its exit code is passed on
    ranks   what horovodrun does: when one fails, the others get SIGTERM and five seconds later SIGKILL, and so do all
            when it gets SIGINT or SIGTERM; it returns 1 if one failed

A launcher that must be real (mpirun, torchrun) starts ranks/stand_in.py in the place of each rank, which asks for one
process alone and passes on signals and the exit code.

Forking is safe only in a process of one thread that has run no torch operation, so the server does nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "HVDLLM_TEST_POOL"  # in the environment of what a launcher starts: name of the server's abstract socket
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
GRACE_S = 5  # as horovodrun gives
POLL_S = 0.02
SPARED = (
    "hvdllm.__main__",
    "hvdllm.bench",
    "hvdllm.launch.ray_driver",
    "hvdllm.report",
    "hvdllm.track.wandb",
    "hvdllm.track.tensorboard",
    "hvdllm.world.mpi",
)  # fmt: skip - tests look at who imports these, or few need them
_code: list[int] = []  # of a rank whose program has ended


# ------------------------------------------------------------------ in the server
def main() -> None:
    atexit.register(leave)  # the first to be registered is the last to be called
    lifeline, listener = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
    prepare()
    lifeline.sendall(b"r")
    become(serve(lifeline, listener))


def prepare() -> None:
    """Imports what ranks import. Raises where that has started a thread, for then no fork is safe."""
    import gc
    import importlib
    import pkgutil

    import horovod.torch  # noqa: F401

    import hvdllm
    from hvdllm.config import compose

    for module in pkgutil.walk_packages(hvdllm.__path__, "hvdllm."):
        if not module.name.startswith(SPARED):
            importlib.import_module(module.name)
    compose.compose([])  # what Hydra keeps of files it has read
    gc.collect()
    gc.freeze()
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("the imports have started a thread: no rank can be forked from here")


def serve(lifeline: socket.socket, listener: socket.socket) -> list[str]:
    """Forks a job for each connection, until the lifeline is closed. Returns in a rank alone: its words."""

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    signal.signal(signal.SIGCHLD, reap)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # ranks that have lost their parent are reaped here, at once
    while lifeline not in (ready := select.select([lifeline, listener], [], [])[0]):
        if listener in ready:
            job = listener.accept()[0]
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                lifeline.close()
                listener.close()
                return lead(job)
            job.close()
    sys.exit(0)


def lead(job: socket.socket) -> list[str]:
    """Forks the ranks that the connection asks for, says their pids and then the exit code, and ends.
    Returns in a rank alone."""
    said, fds, _, _ = socket.recv_fds(job, 1 << 20, 3)
    if not said:
        os._exit(0)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    ask = json.loads(said)
    alone = ask["alone"]
    if not alone:
        os.setsid()
    ranks: dict[int, int] = {}
    for rank, env in enumerate(ask["envs"]):
        pid = os.fork()
        if pid == 0:
            job.close()
            os.setsid()
            os.chdir(ask["cwd"])
            os.environ.clear()
            os.environ.update(env)
            return ask["words"]
        ranks[pid] = rank
    job.sendall(json.dumps(list(ranks) if alone else [os.getpid(), *ranks]).encode())
    code = attend(ranks, job, alone)
    with contextlib.suppress(OSError):
        job.sendall(json.dumps(code).encode())
    os._exit(0)


def attend(ranks: dict[int, int], job: socket.socket, alone: bool) -> int:
    """Waits for the ranks. Returns the exit code of one that is alone, else 1 if one failed, which ends the others."""

    def send(number: int) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(*_: object) -> None:
        send(signal.SIGTERM)
        signal.alarm(GRACE_S)

    if not alone:
        signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
    failed = 0
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if select.select([job], [], [], POLL_S)[0]:  # nothing is ever said here: it was closed
                send(signal.SIGKILL)
                time.sleep(POLL_S)
            continue
        code, rank = os.waitstatus_to_exitcode(status), ranks.pop(pid)
        if alone:
            return code
        if code:
            os.write(2, f"rank {rank} ended with {f'signal {-code}' if code < 0 else f'code {code}'}\n".encode())
            if not failed:
                end()
            failed = 1
    return failed


def become(words: Sequence[str]) -> None:
    """Runs `-m module ...`, `-c code ...` or `script ...`, as the interpreter does with what follows its name."""
    kind, *rest = words
    try:
        if kind == "-m":
            sys.argv[:] = rest
            sys.path[0] = os.getcwd()
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv[:] = ["-c", *rest[1:]]
            sys.path[0] = ""
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            sys.argv[:] = words
            sys.path[0] = str(Path(kind).parent)
            runpy.run_path(kind, run_name="__main__")
        _code[:] = [0]
    except SystemExit as error:
        _code[:] = [error.code & 255 if isinstance(error.code, int) else int(error.code is not None)]
        raise
    except Exception:
        _code[:] = [1]
        raise


def leave() -> None:
    """Of a rank: to take down all that was imported costs more than most tests do. Not after Ctrl-C, which Python ends
    by the signal itself."""
    if _code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_code[0])


# ------------------------------------------------------------------ in pytest
def forkable(words: Sequence[str]) -> bool:
    """Whether it is a Python program that a fork can become."""
    return words[0] == sys.executable and (words[1] in ("-m", "-c") or words[1].endswith(".py"))


class Forked:
    """One job: pid of who attends to its ranks (of the process itself if it is alone), pids of the ranks. As a Popen
    it has poll, wait and returncode."""

    def __init__(self, words: Sequence[str], envs: Sequence[Mapping[str, str]], out: int, alone: bool) -> None:
        assert forkable(words), words
        ask = {"words": words[1:], "envs": [dict(env) for env in envs], "alone": alone, "cwd": str(ROOT)}
        self.returncode: int | None = None
        self._job = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._job.connect("\0" + address())
        with open(os.devnull) as nothing:
            socket.send_fds(self._job, [json.dumps(ask).encode()], [nothing.fileno(), out, out])
        pids = json.loads(self._job.recv(1 << 16))
        self.pid: int = pids[0]
        self.ranks: list[int] = pids if alone else pids[1:]

    def poll(self) -> int | None:
        return self._hear(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._hear(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a job of the fork server", timeout or 0.0)
        return code

    def _hear(self, limit_s: float | None) -> int | None:
        """The exit code, once it is there; who closed the connection without one has been killed."""
        if self.returncode is None and select.select([self._job], [], [], limit_s)[0]:
            said = self._job.recv(1 << 16)
            self.returncode = json.loads(said) if said else -signal.SIGKILL
            self._job.close()
        return self.returncode


_started: list[str] = []


def address() -> str:
    """Where the server of this process listens. It is started when it is first needed."""
    if not _started:
        from launch import environment

        name = f"hvdllm-test-pool-{os.getpid()}-{os.urandom(8).hex()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("\0" + name)
        listener.listen(64)
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), listener.fileno()]
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, cwd=ROOT, start_new_session=True,
            env=environment(OPENBLAS_NUM_THREADS="1"),  # more would be threads at its import
        )  # fmt: skip
        theirs.close()
        listener.close()
        assert ours.recv(1) == b"r", "the fork server did not start: see above"

        def close() -> None:
            ours.close()
            process.wait(60)

        atexit.register(close)
        _started.append(name)
    return _started[0]


if __name__ == "__main__":
    main()
