"""Which parts go together, by their facts (registry.py): the one place that the check and the pages read.

A pair that is not refused here is run by tests/oracles/test_composition.py, references by test_exchange_ranks.py.
"""

from __future__ import annotations

from hvdllm import registry
from hvdllm.registry import HOROVOD, LETTERS, LIBRARIES, PIECES, SUMS, TORCH, Part
from hvdllm.settings import Config, Setup
from hvdllm.world.detect import Place

# Why a wire that cannot carry what an exchange asks for is refused.
CANNOT = {
    SUMS: "this wire carries no whole sums: take another",
    PIECES: "this wire needs whole matrices, and this exchange hands out slices of sums: take allreduce or delayed",
    LETTERS: "a push is one rank's and goes to the servers as it is, no sum of ranks that a wire could code: take fp32",
    TORCH: "torch has hooks of its own for fp16, bf16 and powersgd alone: take one of these, or allreduce",
    HOROVOD: "Horovod's own optimizer compresses to fp16 alone: take fp32 or fp16, or allreduce",
}
START = {TORCH: "torchrun --nproc-per-node 2 -m hvdllm train", HOROVOD: "horovodrun -np 2 hvdllm train"}


def setup_of(config: Config, place: Place) -> Setup:
    """The ranks that these settings come to, and what carries their bytes."""
    exchange = registry.of("exchange", config.exchange).facts
    if config.world.kind != "auto":
        transport = str(config.world.kind)
    elif place.launcher == "none":
        transport = "single"
    else:
        transport = "torch" if place.launcher == "torchrun" or exchange.carries == TORCH else "horovod"
    ranks, local = place.size, place.local_size
    if config.world.kind == "virtual":
        ranks, local = config.world.size, config.world.size // config.world.hosts
    return Setup(config, ranks, local, place.launcher, transport)


def refusal(setup: Setup) -> str | None:
    """Why these parts do not go together, or cannot be as their settings say, in one sentence; None where they do."""
    config = setup.config
    exchange, wire = registry.of("exchange", config.exchange), registry.of("wire", config.wire)
    why = unfit(exchange, wire) or _library(setup, exchange, wire) or _letters(setup, exchange) or _hierarchy(config)
    why = why or _fresh(config, exchange)
    for group in registry.GROUPS if why is None else ():
        if (why := getattr(config, group).refusal(setup)) is not None:
            return str(why)
    return why


def unfit(exchange: Part, wire: Part) -> str | None:
    """Why this wire does not carry what this exchange asks of it."""
    if exchange.facts.carries in wire.facts.carries:
        return None
    return f"exchange={exchange.name} with wire={wire.name}: {CANNOT[exchange.facts.carries]}"


def _library(setup: Setup, exchange: Part, wire: Part) -> str | None:
    """A reference exchange lets its library move the sums."""
    library, settings = exchange.facts.carries, setup.config.wire
    if not exchange.facts.buckets and setup.config.exchange.bucket_mb is not None:
        return f"exchange.bucket_mb with exchange={exchange.name}: it sends no buckets of ours, leave it at null"
    if library not in LIBRARIES:
        return None
    if setup.transport != library:
        return f"exchange={exchange.name} runs on world={library} alone: {START[library]} exchange={exchange.name}"
    if settings.hierarchical:
        return f"wire.hierarchical=true with exchange={exchange.name}: its library moves the sums, take allreduce"
    if not wire.facts.hooked and settings != type(settings)():
        return (
            f"wire settings with exchange={exchange.name}: its library casts by itself and reads none of them, leave "
            "them out"
        )
    return None


def _letters(setup: Setup, exchange: Part) -> str | None:
    """Under Gloo mpi4py would see, in every rank, a world of one."""
    if exchange.facts.carries != LETTERS:
        return None
    transport = registry.parts("transport")[setup.transport]
    if setup.transport == "single" or setup.launcher in transport.facts.letters:
        return None
    started = "torch.distributed" if setup.transport == "torch" else "Gloo"
    return (
        f"exchange={exchange.name} sends letters between two ranks over MPI, and ranks that {started} joins have none: "
        f"start them with horovodrun --mpi -np 3 hvdllm train exchange={exchange.name} (or mpirun), or take "
        "world=virtual"
    )


def _hierarchy(config: Config) -> str | None:
    if not config.wire.hierarchical:
        return None
    exchange, wire = registry.of("exchange", config.exchange), registry.of("wire", config.wire)
    if exchange.facts.carries not in (SUMS, PIECES):
        return f"wire.hierarchical=true with exchange={exchange.name}: {CANNOT[exchange.facts.carries]}"
    if PIECES not in wire.facts.carries:
        return f"wire.hierarchical=true with wire={wire.name}: a host's share is a slice, and it needs whole matrices"
    return None


def _fresh(config: Config, exchange: Part) -> str | None:
    if exchange.facts.fresh_optimizer and getattr(config.optim, "freeze_tokens", None) is not None:
        return (
            f"optim.freeze_tokens with exchange={exchange.name}: its optimizer begins anew within the run, with second "
            "moments that have learnt nothing which could be kept; leave it at null"
        )
    return None


def matrix() -> str:
    """The table of exchanges and wires as hvdllm/exchange/wire/README.md shows it, in Markdown."""
    wires = registry.parts("wire")
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(f"`{name}`" for name in wires) + " |", "|---" * (len(wires) + 1) + "|"]
    for name, exchange in registry.parts("exchange").items():
        cells = []
        for wire in wires.values():
            why = CANNOT[exchange.facts.carries]
            cells.append("yes" if unfit(exchange, wire) is None else f"no ({notes.setdefault(why, len(notes) + 1)})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({number}) {why}." for why, number in notes.items())])
