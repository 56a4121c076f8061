"""How a sum travels: the wires, by the class of their settings.

plain.py         as it is
coded.py         fp16, bf16, int8, top-k, sign: one mechanism, codecs.py holds their codes
powersgd.py      products of thin matrices
feedback.py      what the lossy ones keep
hierarchical.py  around any of the others but powersgd: only one rank's share crosses hosts
"""

from __future__ import annotations

from typing import Any

from hvdllm.config import schema
from hvdllm.exchange.base import Wire
from hvdllm.exchange.wire.coded import Bf16, Fp16, Int8, Sign, TopK
from hvdllm.exchange.wire.hierarchical import Hierarchical
from hvdllm.exchange.wire.plain import Plain
from hvdllm.exchange.wire.powersgd import PowerSGD
from hvdllm.world.base import World

WIRES: dict[type, type[Plain]] = {
    schema.Fp32: Plain,
    schema.Fp16: Fp16,
    schema.Bf16: Bf16,
    schema.Int8: Int8,
    schema.TopK: TopK,
    schema.Sign: Sign,
    schema.PowerSGD: PowerSGD,
}


def make(settings: Any, world: World, flat: Any, nominal: int) -> Wire:
    """flat: the one map; nominal: tokens of a global batch. Collective where hierarchical."""
    kind = WIRES[type(settings)]
    if settings.hierarchical:
        return Hierarchical(world, settings, flat, nominal, kind)
    return kind(world, settings, flat, nominal)
