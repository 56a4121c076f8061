"""The exchanges that the contract is asked of: every registered one that logical ranks can run, and more settings of
some of them.

A registered part is here without being named: its settings are the defaults, but for the few that would let nothing
happen in a short run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rig import NOMINAL

from hvdllm import registry
from hvdllm.exchange.parts import DiLoCo, Exchange, FedAvg, LocalSGD, ParameterServer, StreamingDiLoCo

SHORT: dict[str, Any] = {
    "local_steps": 4, "pulses": 4, "warmup_tokens": NOMINAL, "fragments": 2, "clients": 5, "sampled": 3, "staleness": 0,
}  # fmt: skip
MORE: dict[str, list[Any]] = {
    "local_sgd": [LocalSGD(local_steps=4, pulses=4, warmup_tokens=20)],
    "diloco": [
        DiLoCo(local_steps=3, pulses=1), DiLoCo(local_steps=4, pulses=2, outer_lr=0.2, overlap=True),
        DiLoCo(local_steps=3, pulses=1, outer_lr=0.2, overlap=True),
        DiLoCo(local_steps=4, pulses=4, inner="allreduce", group=2),
    ],
    "streaming_diloco": [
        StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
        StreamingDiLoCo(local_steps=4, fragments=2, delay=0, mixing=0.0),
    ],
    "fedavg": [
        FedAvg(clients=6, sampled=4, local_steps=2, pulses=2),
        FedAvg(clients=6, sampled=3, local_steps=4, pulses=4, prox=0.1),
        FedAvg(clients=4, local_steps=3, pulses=3, server="adam"),
        FedAvg(clients=4, sampled=2, local_steps=3, pulses=1, outer_lr=0.7, outer_momentum=0.9),
    ],
    "parameter_server": [ParameterServer(staleness=0, servers="1")],
}  # fmt: skip


def short(part: registry.Part) -> Exchange:
    names = {field.name for field in dataclasses.fields(part.settings)}
    settings: Exchange = part.settings(**{name: value for name, value in SHORT.items() if name in names})
    return settings


def facts(exchange: Exchange) -> registry.ExchangeFacts:
    found: registry.ExchangeFacts = registry.of("exchange", exchange).facts
    return found


def size(exchange: Exchange) -> int:
    """Ranks that are enough for two that train, or two groups."""
    return 4 if exchange.groups else 2 + exchange.dedicated


PARTS = {
    name: part for name, part in registry.parts("exchange").items() if part.facts.carries not in registry.LIBRARIES
}
SHORTEST = {name: short(part) for name, part in PARTS.items()}
EVERY = SHORTEST | {f"{name}-{k}": more for name, several in MORE.items() for k, more in enumerate(several)}
ROUNDS = {name: settings for name, settings in SHORTEST.items() if facts(settings).identical}
LOCAL = {name: settings for name, settings in EVERY.items() if facts(settings).local and not settings.groups}
