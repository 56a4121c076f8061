"""A Slurm cluster of two nodes on this machine: its own munged, slurmctld and slurmd, on free ports, in a folder of its
own; nothing is installed, and nothing of a cluster that the machine belongs to is touched.

Every process carries the path of the cluster's configuration in its environment, jobs too: so all are found and ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import ROOT, environment

LIMIT_S = 90.0  # a hang guard
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

# cred_expire: a job that is queued again waits that long. TmpFS: else PMIx of two nodes on one host would collide.
CONFIGURATION = """
ClusterName=hvdllm
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
TmpFS={home}/tmp.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
EnforcePartLimits=ANY
ReturnToService=2
JobRequeue=1
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=paid Nodes=n1,n2 AllowAccounts=physics State=UP
"""


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    lacks = [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if lacks:
        return f"{', '.join(lacks)} not installed: jobs/setup.sh --dev installs Slurm and munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    """conf: its configuration. env: for its commands, and for what submits jobs."""

    def __init__(self, home: Path) -> None:
        self.home, self.conf = home, home / "slurm.conf"
        self.env = environment(SLURM_CONF=str(self.conf))
        self.env["PATH"] += ":/usr/sbin"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool.n1", "spool.n2", "tmp.n1", "tmp.n2"):
            (self.home / name).mkdir()
        key = self.home / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(CONFIGURATION.format(home=self.home, host=host, ports=free_ports(3)))
        own = (f"--{what}-file={self.home}/munge.{what}" for what in ("key", "pid", "log", "seed"))
        self.daemon("munged", "--foreground", "--force", f"--socket={self.home}/munge.socket", *own)
        self.until(lambda: (self.home / "munge.socket").exists())
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D", "-N", "n1")
        self.daemon("slurmd", "-D", "-N", "n2")
        self.until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "main") == "2")

    def daemon(self, *words: str) -> None:
        self.daemons.append(
            subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints, errors too."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=LIMIT_S)
        return (done.stdout + done.stderr).strip()

    def sbatch(self, *words: str, **more: str) -> str:
        """Submits from the clone. Returns the job's number."""
        command = ["sbatch", "--parsable", *words]
        done = subprocess.run(command, env=self.env | more, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job))
        return found[1] if found else "UNKNOWN"

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.ask("scontrol", "show", "job", job))
        return found[1] if found else ""

    def ended(self, job: str, log: Path) -> str:
        """Waits for the job's end. Returns its log."""
        self.until(lambda: self.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), log)
        return log.read_text() if log.exists() else ""

    def until(self, what: Callable[[], bool], log: Path | None = None) -> None:
        end = time.monotonic() + LIMIT_S
        while not what():
            if time.monotonic() > end:
                logs = [*self.home.glob("*.log"), *([log] if log else [])]
                raise AssertionError(
                    "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs if path.exists())
                )
            time.sleep(0.1)

    def idle(self) -> None:
        """Ends all jobs and waits until the nodes are free again."""
        self.ask("scancel", "--quiet", "--user=root")
        self.until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "main") == "2")

    def pids(self) -> list[int]:
        found = []
        mark = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self.daemons:
                daemon.poll()
            time.sleep(0.05)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2, of one core each. Its folder's path is short: sockets' paths have 107 letters."""
    with tempfile.TemporaryDirectory(prefix="hvdllm-slurm-") as home:
        os.chmod(home, 0o755)  # munge's socket is for all
        made = Cluster(Path(home))
        try:
            made.start()
            yield made
        finally:
            made.stop()


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":  # a cluster to try things by hand
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with cluster() as here:
        print(f"export SLURM_CONF={here.conf}", flush=True)
        signal.pause()
