"""What runs inside a Slurm job: takes hosts and ranks from Slurm, starts the ranks, hands signals on to them.

    exec python -m hvdllm.launch.inside [--how srun|gloo|horovodrun] [--interface eth0] -- hvdllm train …

as the last line of a batch script (or within salloc). With `exec`, because the signal before a time limit
(`--signal=B:USR1@60`) reaches only the process that is the batch script:

  SIGUSR1          the limit is near: the ranks save and stop, then the job is queued again, under its number
  SIGTERM, SIGINT  the ranks save and stop

Only a run that stopped in good order is queued again: rank 0 has left its tokens in a hidden file of the folder that
the job was submitted from. LIVES lives one after the other that got no further end it.

A queued-again job trains on where the run has a name of its own (`name=`): that is what finds the checkpoint. To save
without an end: `scancel --signal=USR1 JOB`, which reaches the ranks and not this process.

how: srun starts the ranks itself and introduces them by PMIx. gloo is for clusters without a PMIx that fits Open MPI
and without ssh: srun starts the ranks and here runs the key-value server by which horovodrun lets them meet
(launch/meeting.py; launch/task.py tells them where). It takes what comes with its secret, as long as the ranks live, on
the interface that is named, else on that towards the other nodes where it is known. horovodrun needs ssh between the
nodes, none in a job of one.

srun kills its ranks at a SIGTERM, and horovodrun does 5 s later: so the ranks are told, by scancel or on this node
(one is enough: the next meta tells all), and what started them ends when they have.

Always --kill-on-bad-exit: without it a rank that died leaves the others waiting for it until the time limit. GPUs are
not bound: each rank sees those of its node and takes the one of its local rank (device.choose). As many ranks on each
node: Horovod's hierarchy of hosts needs that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdllm import screen
from hvdllm.errors import STOPPED, RunError, UserError
from hvdllm.interpreter import PYTHON, found
from hvdllm.launch import horovodrun, local, meeting, network
from hvdllm.launch.base import STOP_FILE
from hvdllm.launch.task import MEETING
from hvdllm.settings import INTERFACES
from hvdllm.squeue import said
from hvdllm.world.detect import tasks_per_node

HOW = ("srun", "gloo", "horovodrun")
REPEAT_S = 10
LIVES = 3


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job. job: as scontrol takes it. each: ranks on a node."""

    job: str
    nodes: int
    each: int
    nodelist: str
    cpus: str | None = None  # a rank
    gpus: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.each


def allocation(env: Mapping[str, str] = os.environ) -> Allocation:
    """Raises UserError outside a job, and where nodes have unequal numbers of tasks."""
    if "SLURM_JOB_ID" not in env:
        raise UserError("this is no Slurm job: start it from a batch script (jobs/slurm/train.sbatch) or within salloc")
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    # Without a number of tasks SLURM_TASKS_PER_NODE may count cores: then it is one a node.
    if "SLURM_NTASKS" in env:
        counts = tasks_per_node(env.get("SLURM_TASKS_PER_NODE", ""))
    else:
        counts = [int(env.get("SLURM_NTASKS_PER_NODE", "1"))] * nodes
    if len(counts) != nodes or len(set(counts)) != 1:
        raise UserError(
            f"the {nodes} nodes of this job have {', '.join(map(str, counts))} tasks, and ranks need as many on each: "
            "ask for them by --nodes and --ntasks-per-node, without --ntasks"
        )
    # An array's number is also that of one of its tasks: to requeue it would requeue all of them.
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    gpus = any(name in env for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_TASK"))
    return Allocation(job, nodes, counts[0], env.get("SLURM_JOB_NODELIST", ""), env.get("SLURM_CPUS_PER_TASK"), gpus)


def interfaces(names: str | None) -> dict[str, str]:
    """The environment that keeps all traffic on these interfaces (`eth0` or `eth0,eth1`). Gloo takes the first."""
    if not names:
        return {}
    return {
        "HOROVOD_GLOO_IFACE": names.split(",")[0],
        "NCCL_SOCKET_IFNAME": names,
        "OMPI_MCA_btl_tcp_if_include": names,
        "OMPI_MCA_oob_tcp_if_include": names,
    }


def by_srun(here: Allocation, mpi: str, command: list[str]) -> list[str]:
    """srun over the whole job. It does not inherit the cores a task of sbatch since Slurm 22.05."""
    words = ["srun", f"--mpi={mpi}", "--kill-on-bad-exit=1", "--distribution=block", f"--nodes={here.nodes}"]
    words += [f"--ntasks={here.ranks}", f"--ntasks-per-node={here.each}"]
    words += [f"--cpus-per-task={here.cpus}"] if here.cpus else []
    words += ["--gpu-bind=none"] if here.gpus else []
    return [*words, *command]


def by_horovodrun(here: Allocation, hosts: list[str], interface: str | None, command: list[str]) -> list[str]:
    """A job of one node needs no ssh: to horovodrun a node's name may be another host's, localhost is not."""
    names = hosts if here.nodes > 1 else ["localhost"]
    slots = ",".join(f"{host}:{here.each}" for host in names)
    nics = ["--network-interfaces", interface] if interface else []
    return [*horovodrun.starter("gloo"), "--gloo", "-np", str(here.ranks), "-H", slots, *nics, *command]


@contextlib.contextmanager
def meeting_point(here: Allocation, interface: str | None) -> Iterator[str]:
    """Horovod's key-value server, as launch/task.py is told of it: address, port, secret. It ends with the context."""
    try:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    except ImportError as error:
        raise UserError(f"Horovod cannot be imported ({error}): run jobs/setup.sh from a clone of hvdllm") from None
    address = address_of(here, interface)
    places = ",".join(f"node{node}:{here.each}" for node in range(here.nodes))
    point = meeting.MeetingPoint(address, get_host_assignments(parse_hosts(places), here.ranks))
    try:
        yield f"{address or '-'} {point.port} {point.secret}"
    finally:
        point.close()


def address_of(here: Allocation, interface: str | None) -> str:
    """Of this host, for the ranks: on the interface named; of a job on one node the loopback; else on the interface
    towards another node. "" where no name of a node has an address here: then on all interfaces."""
    if interface:
        first = interface.split(",")[0]
        if not (address := network.addresses().get(first, "")):
            raise UserError(
                f"interface {first} is not up with an IPv4 address here: `hvdllm doctor` lists those that are"
            )
        return address
    if here.nodes == 1:
        return "127.0.0.1"
    with contextlib.suppress(OSError, UserError):
        for host in hosts_of(here):
            with contextlib.suppress(OSError):
                towards = network.towards(socket.gethostbyname(host))
                if towards not in (None, "lo"):
                    return network.addresses()[str(towards)]
    return ""


class Ranks:
    """The process that starts the ranks, and what signals ask of it. job: whose steps are the ranks; None: they are
    processes of this node, and others."""

    def __init__(self, job: str | None) -> None:
        self.job, self.mark = job, uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        self.again, self.ended = False, threading.Event()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.process is not None and self.process.poll() is not None:
            return  # they are done: nothing to save, nothing to queue again for
        self.again |= number == signal.SIGUSR1
        self.ended.set()
        if self.process is not None:
            self.end()

    def end(self) -> None:
        """Tells all ranks to save and stop, and again while they live: they may not have been started yet."""
        if self.job is None:
            local.ask([pid for pid, env in local.family(self.mark).items() if "HOROVOD_RANK" in env and not shell(pid)])
        else:
            subprocess.run(["scancel", "--signal=TERM", self.job])
        signal.alarm(REPEAT_S)

    def run(self, command: list[str], env: dict[str, str]) -> int:
        """Starts them and waits. In a process group of its own: a terminal's Ctrl-C reaches it through us alone."""
        if self.ended.is_set():  # before there were any
            return 128 + signal.SIGTERM
        try:
            self.process = subprocess.Popen(command, env={**env, local.MARK: self.mark}, start_new_session=True)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not on PATH of this node: load its module in the batch script") from None
        if self.ended.is_set():
            self.end()
        code = self.process.wait()
        signal.alarm(0)
        return code if code >= 0 else 128 - code


def shell(pid: int) -> bool:
    """By which horovodrun starts a rank: with the same environment."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "bash", "dash")
    return True


def start(how: str, interface: str | None, command: list[str]) -> int:
    """Runs the command on all ranks of this job. Returns its exit code: the largest of the ranks under srun."""
    here = allocation()
    ranks = Ranks(None if how == "horovodrun" else here.job)
    # Open MPI waits by spinning, which takes a core from the compute where ranks have few.
    env = {"PYTHONUNBUFFERED": "1", "OMPI_MCA_mpi_yield_when_idle": "1", **os.environ, **interfaces(interface)}
    life = Life(here.job, Path(os.environ.get("SLURM_SUBMIT_DIR") or "."))
    env |= {STOP_FILE: str(life.path), **found()}
    with contextlib.ExitStack() as stack:
        if how == "srun":
            words = by_srun(here, "pmix", command)
        elif how == "gloo":
            # By the environment, for other users of a node can read a command line.
            env[MEETING] = stack.enter_context(meeting_point(here, interface))
            words = by_srun(here, "none", ["--export=ALL", *PYTHON, "hvdllm.launch.task", "--", *command])
        else:
            words = by_horovodrun(here, hosts_of(here), interface, command)
        code = ranks.run(words, env)
    if not life.stopped():
        return code
    if ranks.again:
        life.keep()
        requeue(here.job)
    else:
        life.forget()
    return STOPPED  # whatever the launcher made of it: it may have ended the other ranks once rank 0 had


class Life:
    """What one life of a job leaves to the next: a file that rank 0 writes the tokens of its stop to, and behind them
    how many lives had got no further."""

    def __init__(self, job: str, folder: Path) -> None:
        self.path = (folder / f".hvdllm-{job}.stopped").absolute()
        tokens, self.idle = self._read()
        self.before = max(0, tokens)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _read(self) -> tuple[int, int]:
        """Tokens, -1 where there is no file, and lives that got no further."""
        try:
            numbers = [int(word) for word in self.path.read_text().split()[:2]]
        except (OSError, ValueError):
            numbers = []
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (numbers[0] if numbers else -1, 0)

    def stopped(self) -> bool:
        """Did rank 0 stop in good order?"""
        return self._read()[0] >= 0

    def keep(self) -> None:
        """For the next life. Raises RunError where lives have come to nothing too often."""
        tokens, _ = self._read()
        idle = self.idle + 1 if tokens == self.before else 0
        if idle >= LIVES:
            self.forget()
            raise RunError(
                f"{LIVES} lives of this job came no further than {tokens:,} tokens, so it is not queued again: give it "
                "a longer --time, or let the signal before the limit come later (--signal)"
            )
        self.path.write_text(f"{tokens} {idle}\n")

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def hosts_of(here: Allocation) -> list[str]:
    done = subprocess.run(["scontrol", "show", "hostnames", here.nodelist], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm does not know the hosts {here.nodelist} ({said(done.stderr)})")
    return done.stdout.split()


def requeue(job: str) -> None:
    """Ends this job, and so this process, and queues it again."""
    print(f"hvdllm: the time limit is near: the run has stopped, and job {job} is queued again", flush=True)
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"Slurm does not queue job {job} again ({said(done.stderr)}): submit the same file again, it goes on"
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m hvdllm.launch.inside", description="Starts the ranks of a Slurm job, from inside it."
    )
    parser.add_argument("--how", choices=HOW, default="srun", help="what starts the ranks (default: %(default)s)")
    parser.add_argument("--interface", help="network interfaces of the nodes: eth0 or eth0,eth1 (default: any)")
    parser.add_argument("command", nargs="+", help="what each rank runs, behind --")
    given = parser.parse_args(argv)
    if given.interface and not re.fullmatch(INTERFACES[0], given.interface):
        raise UserError(f"--interface {given.interface}: give {INTERFACES[1]}")
    if not shutil.which(given.command[0]):
        raise UserError(f"{given.command[0]} is not on PATH here: activate its environment in the batch script")
    return start(given.how, given.interface, given.command)


if __name__ == "__main__":
    with screen.guarded():
        try:
            sys.exit(main(sys.argv[1:]))
        except (UserError, RunError) as error:
            print(f"hvdllm: {screen.one_line(str(error))}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, UserError) else 1)
