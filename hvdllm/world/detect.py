"""Finds out which launcher started this process, from its environment alone, without Horovod, MPI or torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hvdllm.errors import UserError

LINK = "HVDLLM_LINK"  # variable in the environment of ranks in the network lab: the rate of their links

# The variables for rank and size of other launchers: MPICH, Intel MPI and Cray (PMI), MVAPICH, Flux, IBM's jsrun, PALS
# and ALPS.
FOREIGN = (
    ("PMI_RANK", "PMI_SIZE"), ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"), ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("PALS_RANKID", "PALS_SIZE"), ("ALPS_APP_PE", "ALPS_APP_SIZE"),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The place of this process among those that were started together.

    Attributes:
        launcher: none, horovodrun, torchrun, mpirun or srun.
        rank, size: its number, and how many processes there are.
        local_rank, local_size: the same on this host.
    """

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place(env: Mapping[str, str] = os.environ) -> Place:
    """Reads the place of this process from its environment.

    The variables of Horovod, torchrun, Open MPI and Slurm are looked for in this order, and the first found decide.
    Slurm's count only inside a step, because a batch script without srun has SLURM_PROCID too.

    Raises UserError if a launcher started ranks that cannot find each other.
    """

    def at(launcher: str, *names: str) -> Place:
        try:
            return Place(launcher, *(int(env[name]) for name in names))
        except (KeyError, ValueError):
            raise UserError(
                f"the environment of {launcher} is incomplete (it needs {', '.join(names)} as numbers): unset what is "
                "left of it to run alone, or start with the launcher"
            ) from None

    if "HOROVOD_RANK" in env:
        return at("horovodrun", *(f"HOROVOD_{v}" for v in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    if "TORCHELASTIC_RUN_ID" in env and "RANK" in env:
        return at("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "OMPI_COMM_WORLD_RANK" in env:
        return at("mpirun", *(f"OMPI_COMM_WORLD_{v}" for v in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        if "PMIX_RANK" not in env:
            if size == 1:
                return Place()
            raise UserError(
                f"srun started {size} processes that know nothing of each other: start them with srun --mpi=pmix"
            )
        tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(size))))
        node = int(env.get("SLURM_NODEID", "0"))
        return Place("srun", int(env["PMIX_RANK"]), size, int(env.get("SLURM_LOCALID", "0")), tasks[node])
    for number, count in FOREIGN:
        if number in env and env.get(count, "2") != "1":
            raise UserError(
                f"a launcher that hvdllm does not know started this ({number}={env[number]}), and its ranks know "
                "nothing of each other: use horovodrun, Open MPI's mpirun, torchrun or srun --mpi=pmix (or unset what "
                "is left of it to run alone)"
            )
    if "PMIX_RANK" in env:
        raise UserError("a PMIx launcher other than mpirun and srun started this: use mpirun, srun or horovodrun")
    return Place()


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's notation: `2(x3),1` becomes [2, 2, 2, 1]."""
    out: list[int] = []
    for part in text.split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            out += [int(found[1])] * int(found[2] or 1)
    return out


def started(pid: int) -> str:
    """The start time of a process in clock ticks, which tells it from a later process with the same pid.

    It is "" if the process is gone, if it is a zombie, or if there is no /proc.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
