"""How a sum travels: the wires, by the class of their settings.

plain.py         as it is
coded.py         fp16, bf16, int8, top-k, sign: one mechanism, codecs.py holds their codes
powersgd.py      products of thin matrices
feedback.py      what the lossy wires leave out and keep for the next sum
hierarchical.py  around any of the others but powersgd: only one rank's share of a host's sum crosses hosts
"""

from __future__ import annotations

from typing import Any

from hvdllm.config import schema
from hvdllm.exchange.base import Wire
from hvdllm.exchange.wire.coded import Bf16Wire, Fp16Wire, Int8Wire, SignWire, TopKWire
from hvdllm.exchange.wire.hierarchical import Hierarchical
from hvdllm.exchange.wire.plain import Plain
from hvdllm.exchange.wire.powersgd import PowerSGDWire
from hvdllm.flat import Flat
from hvdllm.world.base import World

WIRES: dict[type[schema.Wire], type[Plain[Any]]] = {
    schema.Fp32: Plain,
    schema.Fp16: Fp16Wire,
    schema.Bf16: Bf16Wire,
    schema.Int8: Int8Wire,
    schema.TopK: TopKWire,
    schema.Sign: SignWire,
    schema.PowerSGD: PowerSGDWire,
}


def make(settings: schema.Wire, world: World, flat: Flat, nominal: int) -> Wire:
    """nominal: tokens of a global batch. Collective where the wire is hierarchical. Raises TypeError where there is no
    wire for such settings."""
    if type(settings) not in WIRES:
        raise TypeError(f"there is no wire for settings of {type(settings).__name__}: enter it in WIRES")
    kind = WIRES[type(settings)]
    if settings.hierarchical:
        return Hierarchical(world, settings, flat, nominal, kind)
    return kind(world, settings, flat, nominal)
