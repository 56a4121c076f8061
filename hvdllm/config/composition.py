"""Which exchange, wire, reduction, optimizer and world go together: the one table that the check and the pages read.

A pair that is not refused here is run by tests/oracles/test_composition.py, references by test_exchange_ranks.py.
"""

from __future__ import annotations

from hvdllm.config import schema
from hvdllm.config.schema import Config
from hvdllm.world.detect import Place

WHOLE_MATRICES = "PowerSGD needs whole matrices, this exchange hands out slices of sums: take allreduce or delayed"
TORCH_HOOKS = "torch has hooks of its own for fp16, bf16 and powersgd alone: take one of these, or allreduce"
HOROVOD_COMPRESSION = "Horovod's own optimizer compresses to fp16 alone: take fp32 or fp16, or allreduce"

PUSHES = "a push is one rank's and goes to the servers as it is, no sum of ranks that a wire could code: take fp32"

# exchange: {wire: why not}
REFUSED: dict[type, dict[type, str]] = {
    schema.AllReduce: {},
    schema.Delayed: {},
    schema.Sharded: {schema.PowerSGD: WHOLE_MATRICES},
    schema.Acco: {schema.PowerSGD: WHOLE_MATRICES},
    schema.LocalSGD: {},
    schema.DiLoCo: {},
    schema.StreamingDiLoCo: {},
    schema.ParameterServer: dict.fromkeys(
        (schema.Fp16, schema.Bf16, schema.Int8, schema.TopK, schema.PowerSGD, schema.Sign), PUSHES
    ),
    schema.FedAvg: {},
    schema.Ddp: dict.fromkeys((schema.Int8, schema.TopK, schema.Sign), TORCH_HOOKS),
    schema.Horovod: dict.fromkeys(
        (schema.Bf16, schema.Int8, schema.TopK, schema.PowerSGD, schema.Sign), HOROVOD_COMPRESSION
    ),
}
REFERENCES = {schema.Ddp: "torch", schema.Horovod: "horovod"}  # and the world that each needs
START = {"torch": "torchrun --nproc-per-node 2 -m hvdllm train", "horovod": "horovodrun -np 2 hvdllm train"}


def transport(config: Config, place: Place) -> str:
    """The world that these settings come to: single, horovod, torch or virtual."""
    if config.world.kind != "auto":
        return str(config.world.kind)
    if place.launcher == "none":
        return "single"
    return "torch" if place.launcher == "torchrun" or isinstance(config.exchange, schema.Ddp) else "horovod"


def ranks(config: Config, place: Place) -> int:
    """How many will train together."""
    return int(config.world.size if config.world.kind == "virtual" else place.size)


def group_size(config: Config, place: Place) -> int:
    """Ranks that are one replica, where the exchange has local steps."""
    exchange, world = config.exchange, config.world
    if exchange.inner == "none":
        return 1
    host = world.size // world.hosts if world.kind == "virtual" else place.local_size
    return int(exchange.group or host)


def refusal(config: Config, place: Place) -> str | None:
    """Why these parts do not go together, in one sentence; None where they do."""
    world = transport(config, place)
    return (
        _exchange_and_wire(config, world)
        or _adasum(config, ranks(config, place))
        or _groups(config, place)
        or _letters(config, place, world)
        or _wire_and_optimizer(config)
        or _virtual(config, world)
    )


def _exchange_and_wire(config: Config, world: str) -> str | None:
    exchange, wire = config.exchange, config.wire
    name = schema.name_of("exchange", exchange)
    if why := REFUSED[type(exchange)].get(type(wire)):
        return f"exchange={name} with wire={schema.name_of('wire', wire)}: {why}"
    needs = REFERENCES.get(type(exchange))
    if needs and world != needs:
        return f"exchange={name} runs on world={needs} alone: {START[needs]} exchange={name}"
    if needs and wire.hierarchical:
        return f"wire.hierarchical=true with exchange={name}: its library moves the sums, take allreduce"
    if needs and isinstance(wire, schema.Coded) and wire != type(wire)():
        return f"wire settings with exchange={name}: its library casts by itself and reads none of them, leave them out"
    if isinstance(exchange, schema.Ddp) and isinstance(wire, schema.PowerSGD) and exchange.bucket_mb is not None:
        return "exchange.bucket_mb with exchange=ddp wire=powersgd: torch's hook takes one bucket, leave it at null"
    if isinstance(exchange, schema.Horovod) and exchange.bucket_mb is not None:
        return "exchange.bucket_mb with exchange=horovod: Horovod fuses as it comes and reads none, leave it at null"
    if wire.hierarchical and isinstance(wire, schema.PowerSGD):
        return "wire.hierarchical=true with wire=powersgd: a host's share is a slice, PowerSGD needs whole matrices"
    return None


def _groups(config: Config, place: Place) -> str | None:
    exchange = config.exchange
    if not isinstance(exchange, schema.LocalSteps):
        return None
    if exchange.inner == "none":
        if exchange.group is not None:
            return "exchange.group needs exchange.inner=allreduce or sharded: else a group is one rank"
        if exchange.inner_wire != "fp32":
            return "exchange.inner_wire needs exchange.inner=allreduce or sharded: alone nothing travels"
        return None
    size, all_ = group_size(config, place), ranks(config, place)
    if config.wire.hierarchical:
        return "wire.hierarchical=true with exchange.inner: groups are a hierarchy already, leave one of them out"
    if size < 2 or all_ % size or all_ == size:
        return (
            f"exchange.inner={exchange.inner} makes groups of {size} of {all_} ranks: it takes at least two groups of "
            "at least two, all equal; give exchange.group"
        )
    return None


def _letters(config: Config, place: Place, world: str) -> str | None:
    """Letters between two ranks need MPI; under Gloo mpi4py would see, in every rank, a world of one."""
    exchange = config.exchange
    if not isinstance(exchange, schema.ParameterServer):
        return None
    name = "exchange=parameter_server"
    if config.wire.hierarchical:
        return f"wire.hierarchical=true with {name}: {PUSHES}"
    if exchange.bucket_mb is not None:
        return f"exchange.bucket_mb with {name}: gradients travel by servers, not by buckets, leave it at null"
    if world == "torch" or (world == "horovod" and place.launcher == "horovodrun"):
        started = "torch.distributed" if world == "torch" else "Gloo"
        return (
            f"{name} sends letters between two ranks over MPI, and ranks that {started} joins have none: start them "
            f"with horovodrun --mpi -np 3 hvdllm train {name} (or mpirun), or take world=virtual"
        )
    return None


def _adasum(config: Config, size: int) -> str | None:
    if getattr(config.exchange, "reduction", "sum") != "adasum":
        return None
    if not isinstance(config.wire, schema.Fp32) or config.wire.hierarchical:
        return "exchange.reduction=adasum needs wire=fp32, not hierarchical: it works on whole tensors"
    if size & (size - 1):
        return f"exchange.reduction=adasum adds up ranks in pairs: {size} ranks are no power of two"
    return None


def _wire_and_optimizer(config: Config) -> str | None:
    wire, optim = config.wire, config.optim
    if isinstance(config.exchange, schema.FedAvg) and getattr(optim, "freeze_tokens", None) is not None:
        return (
            "optim.freeze_tokens with exchange=fedavg: each client begins with a fresh optimizer, whose second moments "
            "have learnt nothing that could be kept; leave it at null"
        )
    local = isinstance(config.exchange, schema.LocalSteps)
    if local and isinstance(wire, schema.TopK) and wire.momentum:
        return "wire.momentum is that of gradients; this exchange sends what local steps have made: leave it at 0"
    if local:  # no optimizer sees the sums
        return None
    if isinstance(wire, schema.TopK) and wire.momentum:
        if not isinstance(optim, schema.SGD) or optim.momentum:
            return "wire.momentum is that of SGD, moved before the selection: it needs optim=sgd optim.momentum=0"
        if isinstance(config.exchange, schema.Acco):
            return "wire.momentum with exchange=acco: an update takes two halves, the momentum would decay twice"
    frozen = isinstance(optim, schema.AdamW) and optim.freeze_tokens == getattr(wire, "warmup_tokens", None)
    if isinstance(wire, schema.Sign) and isinstance(optim, schema.Adam) and not frozen:
        if not wire.warmup_tokens:
            return "wire=sign with adamw needs exact sums first: give wire.warmup_tokens and optim.freeze_tokens alike"
        return (
            "wire=sign: signs say nothing of second moments, so as in 1-bit Adam these come from exact sums and are "
            f"then frozen: give optim=adamw optim.freeze_tokens={wire.warmup_tokens} (wire.warmup_tokens), or optim=sgd"
        )
    return None


def _virtual(config: Config, world: str) -> str | None:
    if world != "virtual":
        return None
    if config.model.compile:
        return "world=virtual with model.compile=true: logical ranks share a process, they would share what is compiled"
    if getattr(config.exchange, "timed", False) and config.world.tokens_per_s is None:
        return (
            "world=virtual with exchange.timed=true: logical ranks have no times to end a half by; give "
            "world.tokens_per_s, which simulates a clock, or take timed=false"
        )
    return None


def matrix() -> str:
    """The table of exchanges and wires as hvdllm/exchange/wire/README.md shows it, in Markdown."""
    wires = list(schema.SCHEMAS["wire"].items())
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(f"`{name}`" for name, _ in wires) + " |", "|---" * (len(wires) + 1) + "|"]
    for name, exchange in schema.SCHEMAS["exchange"].items():
        cells = []
        for _, wire in wires:
            why = REFUSED[exchange].get(wire)
            cells.append("yes" if why is None else f"no ({notes.setdefault(why, len(notes) + 1)})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"({number}) {why}." for why, number in notes.items())])
