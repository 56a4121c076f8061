"""How a sum travels: the settings of each wire, and what it can carry."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import HOROVOD, LETTERS, PIECES, SUMS, TORCH, WireFacts, name_of, of, part
from hvdllm.settings import Settings, Setup, setting

CUT = frozenset({SUMS, PIECES})  # whole sums, and slices of them


@dataclass
class Wire(Settings):
    """What is common to every wire. What a lossy one leaves out of a sum it keeps for the next (error feedback)."""

    hierarchical: bool = setting(
        False,
        "inside a host in full precision, only one rank's share crosses hosts, and only that hop is coded; needs as "
        "many ranks on each host",
    )


@part(
    "wire",
    "fp32",
    "hvdllm.exchange.wire.plain:Plain",
    WireFacts(CUT | {LETTERS, TORCH, HOROVOD}, exact=True),
)
@dataclass
class Fp32(Wire):
    """The gradients as they are (fp64 where precision=fp64): what arrives is the sum."""


@dataclass
class Coded(Wire):
    """What is common to the wires that code a sum by pieces: encoded twice on its way, added in fp32 between."""

    chunk_mb: float = setting(
        1.0,
        "MiB of gradients encoded at a time, while those before travel; larger ones left a shaped link idle half of "
        "the time, smaller ones have more operations (9.8 MB of fp16 at 200 Mbit/s: 218 ms at 1, 300 at 4)",
        least=0.001,
        most=1e5,
    )


@part(
    "wire", "fp16", "hvdllm.exchange.wire.coded:Fp16Wire", WireFacts(carries=frozenset({SUMS, PIECES, TORCH, HOROVOD}))
)
@dataclass
class Fp16(Coded):
    """Half the bytes, 11 bits of precision. Sums are scaled to the middle of its range by the tokens of a batch: mean
    gradients from 1e-6 to 16 keep their precision; from 64 on they overflow, which stops the run with a sentence."""


@part("wire", "bf16", "hvdllm.exchange.wire.coded:Bf16Wire", WireFacts(CUT | {TORCH}))
@dataclass
class Bf16(Coded):
    """Half the bytes, 8 bits of precision, the range of fp32: nothing to scale, nothing overflows."""


@part("wire", "int8", "hvdllm.exchange.wire.coded:Int8Wire", WireFacts(CUT))
@dataclass
class Int8(Coded):
    """A quarter of the bytes: each block of elements as 8-bit multiples of its largest / 127."""

    block: int = setting(
        256,
        "elements that share a scale of 4 bytes; 256: 1.6 % more bytes than int8 alone, steps of 1/127",
        least=8,
        most=2**20,
    )


@part("wire", "topk", "hvdllm.exchange.wire.coded:TopKWire", WireFacts(CUT))
@dataclass
class TopK(Coded):
    """Only the largest elements of each piece travel, the rest adds up until it is large (Deep Gradient Compression,
    Lin et al., 2018). Vectors (biases, norms) travel whole."""

    density: float = setting(
        0.01,
        "share of the elements that travels, 8 bytes each; with N ranks the way back carries up to N times as many, so "
        "few ranks and few elements save most; .001 in the paper, on far longer runs",
        least=1e-6,
    )
    warmup_tokens: int = setting(
        50_000,
        "committed tokens over which the density falls exponentially from 25 %: 4 % of a run of 1.2 million, as the "
        "paper's 4 of 90 epochs",
        least=0,
    )
    momentum: float = setting(
        0.0,
        "momentum correction with factor masking: each rank chooses from its velocity. Give SGD's momentum here "
        "and set optim.momentum=0; 0 with Adam, whose momentum comes after the sum",
        least=0,
    )

    def refusal(self, setup: Setup) -> str | None:
        if not 0 < self.density <= 1:
            return f"wire.density={self.density} must lie between 0 and 1"
        if self.momentum >= 1:
            return f"wire.momentum={self.momentum} must be smaller than 1"
        if not self.momentum:
            return None
        exchange, optim = of("exchange", setup.config.exchange), of("optim", setup.config.optim)
        if exchange.facts.local:
            return "wire.momentum is that of gradients; this exchange sends what local steps have made: leave it at 0"
        if not optim.facts.linear or getattr(setup.config.optim, "momentum", False):
            return "wire.momentum is that of SGD, moved before the selection: it needs optim=sgd optim.momentum=0"
        if exchange.facts.sums_per_update > 1:
            return (
                f"wire.momentum with exchange={exchange.name}: an update takes {exchange.facts.sums_per_update} sums, "
                "and the momentum would decay at each"
            )
        return None


@part("wire", "sign", "hvdllm.exchange.wire.coded:SignWire", WireFacts(CUT, signs=True))
@dataclass
class Sign(Coded):
    """One bit an element and a scale of 4 bytes for each 1024, of the gradients' sum (1-bit SGD, Seide et al., 2014).
    Vectors travel whole. With AdamW second moments are frozen as in 1-bit Adam (Tang et al., 2021); but that one sends
    signs of the momentum, which is smoother, where this wire sends those of the gradients and each rank's momentum
    averages them."""

    warmup_tokens: int = setting(
        200_000,
        "committed tokens before which sums are exact: 17 % of a run of 1.2 million; 1-bit Adam takes 15 to 25 %",
        least=0,
    )
    scale: str = setting(
        "l1",
        "l1: mean |u|, which always brings the receiver nearer (a contraction); l2: root mean square as in 1-bit Adam, "
        "which keeps the norm but overshoots where few elements are large",
        choices=("l1", "l2"),
    )

    def refusal(self, setup: Setup) -> str | None:
        if of("exchange", setup.config.exchange).facts.local:  # no optimizer sees the sums
            return None
        optim, name = setup.config.optim, name_of("optim", setup.config.optim)
        facts = of("optim", optim).facts
        if not facts.second_moments or (facts.freezes and optim.freeze_tokens == self.warmup_tokens):
            return None
        if not self.warmup_tokens:
            return (
                f"wire=sign with {name} needs exact sums first: give wire.warmup_tokens and optim.freeze_tokens alike"
            )
        return (
            "wire=sign: signs say nothing of second moments, so as in 1-bit Adam these come from exact sums and are "
            f"then frozen: give optim=adamw optim.freeze_tokens={self.warmup_tokens} (wire.warmup_tokens), or optim=sgd"
        )


@part(
    "wire",
    "powersgd",
    "hvdllm.exchange.wire.powersgd:PowerSGDWire",
    WireFacts(frozenset({SUMS, TORCH}), hooked=True),
)
@dataclass
class PowerSGD(Wire):
    """Each matrix as a product of two thin ones, found by one step of the power method from the last one's (Vogels et
    al., 2019). Only where replicas get whole sums (exchange=allreduce, delayed)."""

    rank: int = setting(4, "columns of the thin matrices; 4 as in the paper's language models", least=1, most=65_536)
    warmup_tokens: int = setting(
        100_000,
        "committed tokens before which sums are exact: early gradients change too fast to be followed; some dozen "
        "updates (the paper's code: 100)",
        least=0,
    )
    min_compression: float = setting(
        2.0, "tensors that would shrink by less than this factor travel uncompressed; 2 as in the paper's code", least=0
    )
