"""Registers the worlds, by what carries their bytes, and the settings that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import TransportFacts, part
from hvdllm.settings import Settings, Several, setting


@part("world", "world", None)
@part("transport", "single", "hvdllm.world.single:opened", TransportFacts())
@part("transport", "horovod", "hvdllm.world.hvd:opened", TransportFacts(letters=("mpirun", "srun")))
@part("transport", "torch", "hvdllm.world.torch:opened", TransportFacts())
@part("transport", "virtual", "hvdllm.world.virtual:run", TransportFacts(letters=("none",), logical=True))
@dataclass
class World(Settings):
    """Which processes train together, and how they talk."""

    kind: str = setting(
        "auto",
        "auto (what started us, and the exchange, decide), single (this process alone), horovod, torch "
        "(torch.distributed: torchrun, or any launcher) or virtual (logical ranks in one process: for oracles and "
        "convergence, not for speed)",
        choices=("auto", "single", "horovod", "torch", "virtual"),
    )
    size: int = setting(4, "logical ranks of world=virtual; elsewhere the launcher decides", least=1, most=4096)
    hosts: int = setting(
        1, "logical hosts of world=virtual, a divisor of its size; for wire.hierarchical", least=1, most=4096
    )
    slow: Several = setting(
        None,
        "ranks made slower than they are, for experiments: rank:factor such as 1:4, or a list, [1:4,3:2]; by computing "
        "that much more, by sleeping where ranks outnumber cores, on a simulated clock by its time; null: none",
    )
    tokens_per_s: float | None = setting(
        None,
        "tokens a second that a logical rank computes on a simulated clock: then all seconds of the records are "
        "simulated, exchange.timed has times to go by, and runs repeat bit for bit; null: no such clock",
        least=1e-3,
        most=1e15,
    )
    speed_spread: float = setting(
        0.0,
        "on the simulated clock, how unequal ranks are: standard deviation of the logarithm of their speeds, "
        "drawn from the seed (.3: one rank in three is faster than 1.34 or slower than 0.75 times)",
        least=0,
        most=10,
    )
    jitter: float = setting(
        0.0,
        "on the simulated clock, a micro-batch takes 1 + jitter x X times as long, X of mean 1 with a heavy tail "
        "(Pareto of index 2), drawn from the seed",
        least=0,
        most=1e6,
    )
    bandwidth: str | None = setting(
        None,
        "on the simulated clock, rate of each rank's link such as 200mbit; what stays inside one of several "
        "logical hosts takes no time; null: nothing takes time for its size",
    )
    latency_ms: float = setting(0.0, "on the simulated clock, of everything that travels", least=0, most=1e9)
    timeout_s: float = setting(
        1800.0,
        "seconds a rank waits for the others before it gives up with a sentence; longer than any act",
        least=1,
        most=1e6,
    )
