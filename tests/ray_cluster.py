"""A Ray cluster of two nodes on this machine, each with one CPU, in a folder of its own; no other Ray is touched.

Every process carries the path of that folder in its environment, ranks too: so all are found and ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import environment
from slurmd import free_ports

LIMIT_S = 90.0  # a hang guard
MARK = "HVDLLM_TEST_RAY"


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    return "" if importlib.util.find_spec("ray") else "Ray is not installed: pip install hvdllm[ray]"


class Cluster:
    """home: its folder. address: of its head. env: for what uses it. ray: the part of env by which it is reached, with
    a token, since Ray listens on all interfaces."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ports = free_ports(2)
        self.address = f"127.0.0.1:{self.ports[0]}"
        self.ray = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = environment(**{MARK: str(home), "RAY_worker_niceness": "0"}, **self.ray)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Starts a node. The first one is the head."""
        words = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        words += ["--num-cpus=1", "--object-store-memory=80000000", f"--node-name={name}"]
        words += ["--min-worker-port=0", "--max-worker-port=0"]  # any free ones: the nodes share the machine's
        if self.daemons:
            words += [f"--address={self.address}"]
        else:
            words += [
                "--head",
                f"--port={self.ports[0]}",
                f"--ray-client-server-port={self.ports[1]}",
                "--include-dashboard=false",
                f"--temp-dir={self.home}/ray",
            ]
        with open(self.home / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.until(lambda: "Ray runtime started" in (self.home / f"{name}.log").read_text())

    def kill(self, name: str) -> None:
        """Kills a node as a power cut does, ranks aside, and all that Ray has started there."""
        (raylet,) = (pid for pid in self.pids() if comm(pid) == "raylet" and parent(pid) == self.daemons[name].pid)
        os.kill(raylet, signal.SIGKILL)
        self.daemons.pop(name).wait(LIMIT_S)
        (self.home / f"{name}.log").unlink()

    def pids(self) -> list[int]:
        """Living processes of the cluster, and of what was started with its environment."""
        found, mark = [], f"{MARK}={self.home}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if mark in (entry / "environ").read_bytes() and entry.name != str(os.getpid()):
                    found.append(int(entry.name))
        return found

    def ranks(self) -> dict[int, int]:
        """The pid of each living rank."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError, StopIteration):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                env = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                if words[3:5] == ["hvdllm", "train"]:
                    number = next(word for word in env if word.startswith("HOROVOD_RANK="))
                    found[int(number.partition("=")[2])] = pid
        return found

    def actor(self, rank: int) -> int:
        """The pid of the actor of a rank: the parent of its keeper."""
        return parent(parent(self.ranks()[rank]))

    def until(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        while not what():
            logs = [path.read_text()[-3000:] for path in self.home.glob("*.log")]
            ended = any(daemon.poll() is not None for daemon in self.daemons.values())
            assert time.monotonic() < end and not ended, "\n".join(logs)
            time.sleep(0.05)

    def close(self) -> None:
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self.daemons.values():
                daemon.poll()
            time.sleep(0.02)
        for daemon in self.daemons.values():
            daemon.wait(LIMIT_S)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="hvdllm-") as home:  # short: Ray's sockets lie there
        made = Cluster(Path(home))
        try:
            made.start("n1")
            made.start("n2")
            yield made
        finally:
            made.close()


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
