"""What others ask of an exchange: facts and methods of the protocol, never its class."""

from __future__ import annotations

from typing import Any

import pytest

from hvdllm.config import schema
from hvdllm.exchange.base import Milestones
from hvdllm.trainer.build import EXCHANGES as ALL


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_exchange_takes_what_a_run_tells_it(kind: Any) -> None:
    exchange, wanted, told = ALL[kind](kind(), 24), Milestones((8,), (4,), 100), []
    exchange.milestones, exchange.unlike = wanted, True
    exchange.watch = lambda *interval: told.append(interval)
    exchange.watch(1, "compute", None, None)
    assert (exchange.milestones, exchange.unlike, len(told)) == (wanted, True, 1)
    assert exchange.marks_on_ask == (kind is schema.ParameterServer)


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        (schema.AllReduce(), 1), (schema.Acco(), 1), (schema.ParameterServer(), 1),
        (schema.LocalSGD(local_steps=16), 16), (schema.DiLoCo(local_steps=50, pulses=1), 50),
        (schema.DiLoCo(local_steps=50, pulses=5), 13), (schema.FedAvg(local_steps=20, pulses=3), 10),
        (schema.StreamingDiLoCo(local_steps=50, fragments=4), 13),
    ],
    ids=repr,
)  # fmt: skip
def test_a_period_is_the_batches_from_one_mark_to_the_next(settings: Any, batches: int) -> None:
    assert ALL[type(settings)](settings, 24).period() == batches
