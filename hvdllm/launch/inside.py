"""What runs inside a Slurm job. It takes hosts and ranks from Slurm, starts the ranks, and passes signals on to them.

    exec python -m hvdllm.launch.inside [--how srun|gloo|horovodrun] [--interface eth0] -- hvdllm train …

is the last line of a batch script, or is typed within salloc. `exec` is needed because the signal before a time limit
(`--signal=B:USR1@60`) reaches only the process of the batch script itself:

  SIGUSR1          the limit is near: the ranks save and stop, then the job is queued again under its number
  SIGTERM, SIGINT  the ranks save and stop

A job is queued again only if the run stopped in good order. Rank 0 then leaves its tokens in a hidden file in the
folder that the job was submitted from. After MOST_IDLE lives in a row that got no further, the job ends.

A job that is queued again goes on with training only if its run has a name (`name=`), by which it finds the checkpoint.
To save without ending, use `scancel --signal=USR1 JOB`, which reaches the ranks and not this process.

There are three ways to start ranks (--how):

  srun        srun starts the ranks and connects them by PMIx.
  gloo        For clusters without ssh, and without a PMIx that fits Open MPI. srun starts the ranks, and this process
              runs the key-value server by which horovodrun lets ranks meet (launch/meeting.py); launch/task.py tells
              them where it is. The server accepts requests with its secret as long as the ranks live. It listens on
              the interface that is named, else on the one towards the other nodes if that is known.
  horovodrun  It needs ssh between nodes; a job of one node needs none.

srun kills its ranks at a SIGTERM, and horovodrun 5 s after it. The ranks are therefore asked to stop by scancel, or by
a signal on this node (one rank is enough, since the next meta tells all). What started them ends when they have ended.

srun always gets --kill-on-bad-exit, because otherwise a rank that died would leave the others waiting until the time
limit. GPUs are not bound: each rank sees those of its node and takes the one of its local rank (device.choose). All
nodes have the same number of ranks, because Horovod's hierarchy of hosts needs that.
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
from hvdllm.launch.lives import MOST_IDLE, Lives
from hvdllm.launch.task import MEETING
from hvdllm.settings import INTERFACES
from hvdllm.squeue import said
from hvdllm.world.detect import tasks_per_node

HOW = ("srun", "gloo", "horovodrun")
REPEAT_S = 10


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given to this job.

    Attributes:
        job: its number, as scontrol takes it.
        nodes: how many it has.
        each: ranks on each node.
        nodelist: the nodes, in Slurm's notation.
        cpus: cores for each rank, if Slurm says so.
        gpus: whether it has any.
    """

    job: str
    nodes: int
    each: int
    nodelist: str
    cpus: str | None = None
    gpus: bool = False

    @property
    def ranks(self) -> int:
        """How many ranks the job has."""
        return self.nodes * self.each


def allocation(env: Mapping[str, str] = os.environ) -> Allocation:
    """Reads the allocation from Slurm's variables.

    Raises UserError outside a job, or if nodes have unequal numbers of tasks.
    """
    if "SLURM_JOB_ID" not in env:
        raise UserError("this is no Slurm job: start it from a batch script (jobs/slurm/train.sbatch) or within salloc")
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    # If no number of tasks was asked for, SLURM_TASKS_PER_NODE may count cores, and there is one task on each node.
    if "SLURM_NTASKS" in env:
        counts = tasks_per_node(env.get("SLURM_TASKS_PER_NODE", ""))
    else:
        counts = [int(env.get("SLURM_NTASKS_PER_NODE", "1"))] * nodes
    if len(counts) != nodes or len(set(counts)) != 1:
        raise UserError(
            f"the {nodes} nodes of this job have {', '.join(map(str, counts))} tasks, and ranks need as many on each: "
            "ask for them by --nodes and --ntasks-per-node, without --ntasks"
        )
    # The number of an array is also that of one of its tasks, and requeueing it would requeue all of them.
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    gpus = any(name in env for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_TASK"))
    return Allocation(job, nodes, counts[0], env.get("SLURM_JOB_NODELIST", ""), env.get("SLURM_CPUS_PER_TASK"), gpus)


def by_srun(here: Allocation, mpi: str, command: list[str]) -> list[str]:
    """The srun command for all ranks. Cores are passed, since srun has not inherited them from sbatch since 22.05.

    Args:
        here: the allocation.
        mpi: as srun's --mpi takes it.
        command: what each rank runs.
    """
    words = ["srun", f"--mpi={mpi}", "--kill-on-bad-exit=1", "--distribution=block", f"--nodes={here.nodes}"]
    words += [f"--ntasks={here.ranks}", f"--ntasks-per-node={here.each}"]
    words += [f"--cpus-per-task={here.cpus}"] if here.cpus else []
    words += ["--gpu-bind=none"] if here.gpus else []
    return [*words, *command]


def by_horovodrun(here: Allocation, hosts: list[str], interface: str | None, command: list[str]) -> list[str]:
    """The horovodrun command for all ranks. In a job of one node the host is `localhost`, for which horovodrun does not
    need ssh; it could take the node's name for another host."""
    names = hosts if here.nodes > 1 else ["localhost"]
    slots = ",".join(f"{host}:{here.each}" for host in names)
    nics = ["--network-interfaces", interface] if interface else []
    return [*horovodrun.starter("gloo"), "--gloo", "-np", str(here.ranks), "-H", slots, *nics, *command]


@contextlib.contextmanager
def meeting_point(here: Allocation, interface: str | None) -> Iterator[str]:
    """A context with Horovod's key-value server. Yields `ADDRESS PORT SECRET`, as launch/task.py takes it."""
    plan = meeting.plan([here.each] * here.nodes)
    address = address_of(here, interface)
    point = meeting.MeetingPoint(address, plan)
    try:
        yield f"{address or '-'} {point.port} {point.secret}"
    finally:
        point.close()


def address_of(here: Allocation, interface: str | None) -> str:
    """The address of this host at which the key-value server listens.

    It is that of the named interface; else the loopback, in a job of one node; else that of the interface towards
    another node. It is "", for all interfaces, if none of this is known.
    """
    if interface:
        return network.address_of(interface)
    if here.nodes == 1:
        return "127.0.0.1"
    with contextlib.suppress(OSError, UserError):
        for host in hosts_of(here):
            with contextlib.suppress(OSError):
                towards = network.towards(socket.gethostbyname(host))
                if towards not in (None, "lo"):
                    return network.addresses()[str(towards)]
    return ""


class Started:
    """The process that starts the ranks, and the handlers of the signals that this process gets.

    Args:
        job: the ranks are steps of this job; None: they are processes that horovodrun has started.
    """

    def __init__(self, job: str | None) -> None:
        self.job, self.mark = job, uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        self.again, self.ended = False, threading.Event()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if self.process is not None and self.process.poll() is not None:
            return  # the ranks have ended, so there is nothing to save or to queue again
        self.again |= number == signal.SIGUSR1
        self.ended.set()
        if self.process is not None:
            self.end()

    def end(self) -> None:
        """Asks all ranks to save and stop. An alarm repeats it, because they may not have been started yet."""
        if self.job is None:
            local.ask([pid for pid, env in local.family(self.mark).items() if "HOROVOD_RANK" in env and not shell(pid)])
        else:
            subprocess.run(["scancel", "--signal=TERM", self.job])
        signal.alarm(REPEAT_S)

    def run(self, command: list[str], env: dict[str, str]) -> int:
        """Starts the ranks, waits for their end, and returns the exit code.

        They are started in a session of their own, so a terminal's Ctrl-C reaches them only through this process.
        """
        if self.ended.is_set():  # before there were any ranks
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
    """Whether a process is the shell by which horovodrun starts a rank, which has the same environment."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "bash", "dash")
    return True


def start(how: str, interface: str | None, command: list[str]) -> int:
    """Runs a command on all ranks of this job.

    Args:
        how: what starts the ranks, one of HOW.
        interface: network interfaces, or None for any.
        command: what each rank runs.

    Returns the exit code, which under srun is the largest of the ranks', or STOPPED if the run stopped in good order.
    """
    here = allocation()
    ranks = Started(None if how == "horovodrun" else here.job)
    # Open MPI waits by spinning, which takes a core from the compute where ranks have few.
    env = {"PYTHONUNBUFFERED": "1", "OMPI_MCA_mpi_yield_when_idle": "1", **os.environ, **network.variables(interface)}
    life = Life(here.job, Path(os.environ.get("SLURM_SUBMIT_DIR") or "."))
    env |= {STOP_FILE: str(life.path), **found()}
    with contextlib.ExitStack() as stack:
        if how == "srun":
            words = by_srun(here, "pmix", command)
        elif how == "gloo":
            # The secret is in the environment, because other users of a node can read command lines.
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
    return STOPPED  # the launcher's code does not count: it may have killed the other ranks after rank 0 ended


class Life:
    """The file that one life of a job leaves to the next.

    Rank 0 writes the tokens at which it stopped, and this process adds how many lives in a row got no further.
    """

    def __init__(self, job: str, folder: Path) -> None:
        self.path = (folder / f".hvdllm-{job}.stopped").absolute()
        tokens, idle = self._read()
        self.lives = Lives(max(0, tokens), idle)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _read(self) -> tuple[int, int]:
        """The tokens, or -1 if there is no file, and the number of lives that got no further."""
        try:
            numbers = [int(word) for word in self.path.read_text().split()[:2]]
        except (OSError, ValueError):
            numbers = []
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (numbers[0] if numbers else -1, 0)

    def stopped(self) -> bool:
        """Whether rank 0 has stopped in good order."""
        return self._read()[0] >= 0

    def keep(self) -> None:
        """Writes the file for the next life. Raises RunError if MOST_IDLE lives in a row got no further."""
        tokens, _ = self._read()
        if not self.lives.ended(tokens):
            self.forget()
            raise RunError(
                f"{MOST_IDLE} lives of this job came no further than {tokens:,} tokens, so it is not queued again: "
                "give it a longer --time, or let the signal before the limit come later (--signal)"
            )
        self.path.write_text(f"{tokens} {self.lives.idle}\n")

    def forget(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


def hosts_of(here: Allocation) -> list[str]:
    """The names of the job's nodes. Raises UserError if Slurm does not know them."""
    done = subprocess.run(["scontrol", "show", "hostnames", here.nodelist], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm does not know the hosts {here.nodelist} ({said(done.stderr)})")
    return done.stdout.split()


def requeue(job: str) -> None:
    """Queues this job again, which also ends it and this process. Raises UserError if Slurm refuses."""
    print(f"hvdllm: the time limit is near: the run has stopped, and job {job} is queued again", flush=True)
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"Slurm does not queue job {job} again ({said(done.stderr)}): submit the same file again, it goes on"
        )


def main(argv: list[str]) -> int:
    """Runs this module as a program, and returns its exit code."""
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
