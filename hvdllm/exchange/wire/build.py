"""A wire from its settings."""

from __future__ import annotations

from hvdllm import registry
from hvdllm.exchange.base import Wire
from hvdllm.exchange.wire import parts
from hvdllm.exchange.wire.hierarchical import Hierarchical
from hvdllm.flat import Flat
from hvdllm.world.base import World


def make_wire(settings: parts.Wire, world: World, flat: Flat, nominal: int) -> Wire:
    """The wire of these settings, around it the hierarchy where they ask for one. Collective in that case.

    flat: the one map.
    nominal: tokens of a global batch.
    """
    kind = registry.built(registry.of("wire", settings))
    wire: Wire
    if settings.hierarchical:
        wire = Hierarchical(world, settings, flat, nominal, kind)
    else:
        wire = kind(world, settings, flat, nominal)
    return wire
