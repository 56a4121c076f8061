"""Starts a point as a horovodrun job, on this machine, on the user's hosts, or on those of the network lab.

horovodrun kills its ranks 5 s after Ctrl-C, and under MPI leaves them alone at SIGTERM. So the ranks themselves are
asked to stop (one is enough, since the next meta tells all), and horovodrun ends when they have ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from hvdllm.config.pace import bits_per_second
from hvdllm.errors import UserError
from hvdllm.interpreter import PYTHON
from hvdllm.launch import lab, local, meeting
from hvdllm.launch.base import Point, Say, command
from hvdllm.launch.parts import Horovodrun
from hvdllm.world.detect import LINK

RANK = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")


def launch(point: Point, settings: Horovodrun, stop: threading.Event, say: Say) -> int:
    """Runs the point as a horovodrun job, as base.Launcher says."""
    with network(settings) as hosts:
        words = [*launcher(settings, hosts), *command(point)]
        return local.run(words, environment(settings, hosts), point.folder / "launch.log", stop, ask_ranks)


def ready(settings: Horovodrun) -> None:
    """Raises UserError if nothing can be started with these settings."""
    program()
    if settings.hosts is not None:
        if not re.fullmatch(r"[^\s,:]+:\d+(,[^\s,:]+:\d+)*", settings.hosts):
            raise UserError(f"launch.hosts={settings.hosts}: give host:slots, several with commas between, in quotes")
        if (slots := sum(settings.slots())) != settings.np:
            raise UserError(
                f"launch.hosts={settings.hosts} has {slots} slots and launch.np={settings.np}: make them equal "
                "(horovodrun --gloo starts a rank for each slot)"
            )
    if settings.link is None:
        return
    if settings.hosts is not None or settings.interface is not None or settings.controller != "gloo":
        raise UserError(
            "launch.link puts the ranks on hosts of the network lab: leave launch.hosts and launch.interface at null "
            "and launch.controller at gloo"
        )
    bits_per_second(settings.link, "launch.link=", "null for the network as it is")
    try:
        lab.Lab(settings.np, settings.link)
    except UserError as error:
        raise UserError(f"launch.link={settings.link}: {error}") from None
    if why := lab.missing():
        raise UserError(f"launch.link={settings.link}: {why}; null trains over the network as it is")


def room(settings: Horovodrun) -> int | None:
    """One, because points share the cores and the network of their hosts."""
    return 1


def program() -> str:
    """The path of this environment's horovodrun. Raises UserError if there is none."""
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise UserError("horovodrun is not here, Horovod is not installed: jobs/setup.sh builds and installs it")
    return found


def starter(controller: str) -> list[str]:
    """The command for horovodrun. Over Gloo it uses a meeting point that asks for a secret (launch/meeting.py)."""
    return [sys.executable, "-P", meeting.__file__] if controller == "gloo" else [program()]


def launcher(settings: Horovodrun, hosts: lab.Lab | None) -> list[str]:
    """The words of the command line before those of a rank. hosts: of the network lab, if it is used."""
    words = [*starter(settings.controller), f"--{settings.controller}", "-np", str(settings.np), "--disable-cache"]
    if hosts is not None:
        where = ",".join(f"{host.address}:1" for host in hosts.hosts)
        return hosts.inside(hosts.hosts[0], [*words, "-H", where, "--network-interfaces", lab.INTERFACE])
    words += ["-H", settings.hosts] if settings.hosts else []
    return words + (["--network-interfaces", settings.interface] if settings.interface else [])


def environment(settings: Horovodrun, hosts: lab.Lab | None) -> dict[str, str]:
    """The environment for horovodrun: that of this process, with what the settings need.

    Variables of Open MPI that the user has set stay as they are.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    interface = lab.INTERFACE if hosts is not None else settings.interface
    env = {"PYTHONUNBUFFERED": "1", "PATH": f"{hosts.folder}{os.pathsep}{path}" if hosts is not None else path}
    if settings.link is not None:
        env[LINK] = settings.link  # for the run's records
    if interface and "," not in interface:
        env["GLOO_SOCKET_IFNAME"] = interface  # torch's Gloo is not told by horovodrun
    if settings.controller == "mpi":
        env |= mpi(here=settings.hosts is None)
    return {**os.environ, **env}


def mpi(here: bool) -> dict[str, str]:
    """The variables that mpirun needs, without those that the user has set. here: all ranks are on this machine."""
    env = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    env |= {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_odls_base_sigkill_timeout": "5"}
    if here and not shutil.which("ssh"):
        env["OMPI_MCA_plm"] = "isolated"  # otherwise mpirun looks for ssh even if it does not need it
    return {name: value for name, value in env.items() if name not in os.environ}


def ask_ranks(pid: int, mark: str) -> None:
    """Asks a job to save and end.

    The ranks on this machine are asked. If there are none, because they are elsewhere or have not begun, horovodrun
    gets SIGINT, as from Ctrl-C.

    Args:
        pid: of horovodrun.
        mark: of the job's processes (local.py).
    """
    ranks = [
        one for one, env in local.family(mark).items() if any(name in env for name in RANK) and _is_rank(one)
    ]  # fmt: skip
    if ranks:
        local.ask(ranks)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)


@contextlib.contextmanager
def network(settings: Horovodrun) -> Iterator[lab.Lab | None]:
    """A context with the network lab, one host for each rank, if launch.link asks for it. The lab is always removed."""
    if settings.link is None:
        yield None
        return
    hosts = lab.Lab(settings.np, settings.link)
    with contextlib.closing(hosts):
        hosts.build()
        yield hosts


def _is_rank(pid: int) -> bool:
    """Whether a process is a rank and not the shell that started it, which has the same environment."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return os.path.basename(words[0]).startswith("python") and words[1:5] == [*PYTHON[1:], "hvdllm", "train"]
