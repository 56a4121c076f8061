"""What others ask of an exchange: facts and methods of the protocol, never its class."""

from __future__ import annotations

from typing import Any

import pytest

from hvdllm import registry
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Milestones


@pytest.mark.parametrize("part", registry.parts("exchange").values(), ids=lambda part: part.name)
def test_every_exchange_takes_what_a_run_tells_it(part: registry.Part) -> None:
    exchange, wanted, told = registry.built(part)(part.settings(), 24), Milestones((8,), (4,), 100), []
    exchange.milestones, exchange.unlike = wanted, True
    exchange.watch = lambda *interval: told.append(interval)
    exchange.watch(1, "compute", None, None)
    assert (exchange.milestones, exchange.unlike, len(told)) == (wanted, True, 1)
    assert exchange.marks_on_ask == (part.name == "parameter_server")


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        (exchanges.AllReduce(), 1), (exchanges.Acco(), 1), (exchanges.ParameterServer(), 1),
        (exchanges.LocalSGD(local_steps=16), 16), (exchanges.DiLoCo(local_steps=50, pulses=1), 50),
        (exchanges.DiLoCo(local_steps=50, pulses=5), 13), (exchanges.FedAvg(local_steps=20, pulses=3), 10),
        (exchanges.StreamingDiLoCo(local_steps=50, fragments=4), 13),
    ],
    ids=repr,
)  # fmt: skip
def test_a_period_is_the_batches_from_one_mark_to_the_next(settings: Any, batches: int) -> None:
    assert settings.batches_a_commit == batches
