"""What others ask of an exchange: facts and methods of the protocol, never its class."""

from __future__ import annotations

from typing import Any

import pytest
from hvdllm.trainer.build import EXCHANGES as ALL

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Milestones


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_exchange_takes_what_a_run_tells_it(kind: Any) -> None:
    exchange, wanted, told = ALL[kind](kind(), 24), Milestones((8,), (4,), 100), []
    exchange.milestones, exchange.unlike = wanted, True
    exchange.watch = lambda *interval: told.append(interval)
    exchange.watch(1, "compute", None, None)
    assert (exchange.milestones, exchange.unlike, len(told)) == (wanted, True, 1)
    assert exchange.marks_on_ask == (kind is exchanges.ParameterServer)


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
    assert ALL[type(settings)](settings, 24).period() == batches
