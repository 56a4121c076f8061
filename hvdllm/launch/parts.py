"""Registers the launchers, which start the ranks of a run, with their settings."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import LauncherFacts, part
from hvdllm.settings import ADDRESS, HOSTS, INTERFACES, MODULE, NAME, NAMES, TIME, Settings, Setup, Several, setting
from hvdllm.world.detect import Place


@dataclass
class Launch(Settings):
    """The settings that all launchers share."""

    sweep: str | None = setting(
        None,
        "of train -m: folder of the sweep under runs_dir; null: named after the experiment and what the sweep varies, "
        "so that the same command finds it again",
    )
    parallel: int | None = setting(
        None,
        "points of a sweep at once; null: 1, under launch=slurm all (Slurm has a queue of its own), under launch=ray "
        "as many as the cluster has room for",
        least=1,
        most=10_000,
    )

    def place(self) -> Place:
        """The place of rank 0 among the ranks that this launcher starts."""
        return Place()

    @property
    def ranks_here(self) -> int:
        """How many ranks of a run compute on this machine; 0 if they compute elsewhere."""
        return 0

    @property
    def cores_of_rank(self) -> int | None:
        """The cores that each rank has for itself, if the launcher gives it some that the rank cannot see."""
        return None


@part("launch", "local", "hvdllm.launch.local", LauncherFacts())
@dataclass
class Local(Launch):
    """This process is the run, or one of its ranks if a launcher started it. Points of a sweep are processes here."""

    @property
    def ranks_here(self) -> int:
        return 1


@part("launch", "horovodrun", "hvdllm.launch.horovodrun", LauncherFacts())
@dataclass
class Horovodrun(Launch):
    """Each run is a horovodrun job of its own, started from here."""

    np: int = setting(2, "ranks of a run", least=1, most=65_536)
    controller: str = setting(
        "gloo", "gloo, or mpi (Open MPI waits by spinning: for more cores than ranks)", choices=("gloo", "mpi")
    )
    hosts: str | None = setting(
        None, "host:slots,host:slots as -H of horovodrun takes them; null: this machine", form=HOSTS
    )
    interface: str | None = setting(
        None, "network interfaces by which the hosts reach each other; null: any", form=INTERFACES
    )
    link: str | None = setting(
        None,
        "rate such as 200mbit or 1gbit: ranks run on hosts of their own in the network lab, joined by links of that "
        "rate (root and iproute2; see hvdllm bench exchange); null: the network as it is",
    )

    def place(self) -> Place:
        return Place("mpirun" if self.controller == "mpi" else "horovodrun", 0, self.np, 0, self.slots()[0])

    def slots(self) -> list[int]:
        """The number of ranks on each host, in order."""
        if self.link is not None:
            return [1] * self.np
        return [int(part.rpartition(":")[2]) for part in self.hosts.split(",")] if self.hosts else [self.np]

    @property
    def ranks_here(self) -> int:
        return self.np if self.hosts is None else 0


@part("launch", "slurm", "hvdllm.launch.slurm", LauncherFacts(queues=True))
@dataclass
class Slurm(Launch):
    """Each run is a Slurm job, submitted by sbatch. This process waits for it and says how it ended."""

    how: str = setting(
        "srun",
        "what starts the ranks inside the job: srun (with PMIx), gloo (srun with Gloo, where there is no PMIx that "
        "fits and no ssh) or horovodrun (needs ssh between nodes)",
        choices=("srun", "gloo", "horovodrun"),
    )
    nodes: int = setting(1, "nodes of a run", least=1, most=65_536)
    ranks_per_node: int = setting(1, "ranks on each node, one a GPU", least=1, most=4096)
    gpus_per_node: int | None = setting(
        None, "GPUs asked for on each node; null: none is asked for", least=1, most=4096
    )
    cpus_per_rank: int | None = setting(None, "cores asked for a rank; null: Slurm's default", least=1, most=65_536)
    time: str | None = setting(None, "limit of a job as sbatch takes it (2:00:00); null: the partition's", form=TIME)
    partition: str | None = setting(None, "partition; null: the cluster's default", form=NAMES)
    account: str | None = setting(None, "account that pays; null: the user's default", form=NAME)
    interface: str | None = setting(None, "network interfaces of the nodes; null: any", form=INTERFACES)
    modules: Several = setting(None, "environment modules that a job loads, a name or a list; null: none", form=MODULE)
    options: Several = setting(None, "further options of sbatch, one or a list (--constraint=a100); null: none")

    def place(self) -> Place:
        launcher = "srun" if self.how == "srun" else "horovodrun"
        ranks = self.nodes * self.ranks_per_node
        if ranks == 1 and self.how == "srun":  # with one task there is no launcher to be seen
            return Place()
        return Place(launcher, 0, ranks, 0, self.ranks_per_node)


@part("launch", "ray", "hvdllm.launch.ray", LauncherFacts())
@dataclass
class Ray(Launch):
    """Each run is placed on the nodes of a Ray cluster that is up already. This process watches its ranks."""

    np: int = setting(2, "ranks of a run", least=1, most=65_536)
    nodes: int | None = setting(
        None, "nodes of a run, with as many ranks on each; null: as few as have room", least=1, most=65_536
    )
    address: str = setting(
        "auto", "head of the cluster, as `ray start` prints it; auto: of the cluster this machine is in", form=ADDRESS
    )
    cpus_per_rank: int = setting(1, "CPUs asked for a rank, which computes with as many threads", least=1, most=65_536)
    gpus_per_rank: int = setting(0, "GPUs asked for a rank: 0, or the 1 that it computes on", least=0, most=1)
    interface: str | None = setting(
        None, "network interfaces of the nodes; null: the one towards this process", form=INTERFACES
    )
    wait_s: float = setting(
        600.0,
        "seconds to wait for a node that was lost, or for another, before the run is given up; then it goes on from "
        "its last checkpoint",
        least=0,
        most=1e7,
    )

    def place(self) -> Place:
        return Place("horovodrun", 0, self.np, 0, self.np // (self.nodes or 1))

    @property
    def cores_of_rank(self) -> int | None:
        return self.cpus_per_rank

    def refusal(self, setup: Setup) -> str | None:
        if self.np % (self.nodes or 1):
            return f"launch.np={self.np} ranks cannot be as many on each of launch.nodes={self.nodes}: give a multiple"
        return None
