"""Which parts go together, according to their facts (registry.py). Both the checks and the pages are derived from this.

Each pair that is not refused here is run by tests/exchange/test_composition.py; those with a reference exchange are run
by test_rounds_on_ranks.py.
"""

from __future__ import annotations

from hvdllm import registry
from hvdllm.registry import HOROVOD, LETTERS, LIBRARIES, PIECES, SUMS, TORCH, Part
from hvdllm.settings import Config, Setup
from hvdllm.world.detect import Place

# Why a wire is refused that cannot carry what an exchange sends.
CANNOT = {
    SUMS: "this wire carries no whole sums: take another",
    PIECES: "this wire needs whole matrices, and this exchange hands out slices of sums: take allreduce or delayed",
    LETTERS: "a push is one rank's and goes to the servers as it is, no sum of ranks that a wire could code: take fp32",
    TORCH: "torch has hooks of its own for fp16, bf16 and powersgd alone: take one of these, or allreduce",
    HOROVOD: "Horovod's own optimizer compresses to fp16 alone: take fp32 or fp16, or allreduce",
}
START = {TORCH: "torchrun --nproc-per-node 2 -m hvdllm train", HOROVOD: "horovodrun -np 2 hvdllm train"}


def setup_of(config: Config, place: Place) -> Setup:
    """How many ranks a run with these settings has, and what carries their bytes.

    Args:
        config: the settings.
        place: the place of this process among those that its launcher started.
    """
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
    """Why these parts do not go together, or why the settings of one cannot work, in one sentence; None if they can."""
    config = setup.config
    exchange, wire = registry.of("exchange", config.exchange), registry.of("wire", config.wire)
    why = unfit(exchange, wire) or _library(setup, exchange, wire) or _letters(setup, exchange) or _hierarchy(config)
    why = why or _fresh(config, exchange) or _rows(config, exchange)
    for group in registry.GROUPS if why is None else ():
        if (why := getattr(config, group).refusal(setup)) is not None:
            return str(why)
    return why


def unfit(exchange: Part, wire: Part) -> str | None:
    """Why this wire cannot carry what this exchange sends, or None if it can."""
    if exchange.facts.carries in wire.facts.carries:
        return None
    return f"exchange={exchange.name} with wire={wire.name}: {CANNOT[exchange.facts.carries]}"


def _library(setup: Setup, exchange: Part, wire: Part) -> str | None:
    """Why a reference exchange, whose library moves the sums, does not fit these settings, or None."""
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
    """Why letters cannot travel between these ranks, or None. Under Gloo each rank would see an MPI world of one."""
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


def _rows(config: Config, exchange: Part) -> str | None:
    if not getattr(config.task, "sparse", False) or exchange.facts.sparse:
        return None
    able = " or ".join(name for name, part in registry.parts("exchange").items() if part.facts.sparse)
    return (
        f"task.sparse=true with exchange={exchange.name}: it sends whole gradients and no rows of tables; take "
        f"exchange={able}, or task.sparse=false"
    )


def matrix() -> str:
    """The table of exchanges and wires in hvdllm/exchange/wire/README.md, in Markdown."""
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
