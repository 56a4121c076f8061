"""What a library of its own, or a server, cannot carry is refused, whoever put the parts together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Nothing
from hvdllm.exchange.ddp import Ddp
from hvdllm.exchange.horovod import Horovod
from hvdllm.exchange.parameter_server import ParameterServer
from hvdllm.exchange.wire import parts as wires
from hvdllm.exchange.wire.build import make_wire
from hvdllm.exchange.wire.coded import Int8Wire
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.optim import parts as optims
from hvdllm.optim.update import Update
from hvdllm.world import virtual
from hvdllm.world.single import SingleWorld
from hvdllm.world.virtual import VirtualWorld

NOMINAL = 24


def attach(exchange: Any, wire: Any) -> None:
    model = nn.Linear(3, 2)
    flat = Flat(model, 1, 1)
    exchange.attach(model, flat, Update(optims.SGD(), lambda tokens: 1.0), wire(flat), SingleWorld())


@pytest.mark.parametrize(
    ("exchange", "settings"),
    [
        (Ddp(exchanges.Ddp(), NOMINAL), wires.Int8()),
        (Horovod(exchanges.Horovod(), NOMINAL), wires.Bf16()),
        (Horovod(exchanges.Horovod(), NOMINAL), wires.Fp16(hierarchical=True)),
    ],
    ids=["ddp-int8", "horovod-bf16", "horovod-hierarchical"],
)
def test_a_library_without_such_a_wire_refuses_it(exchange: Any, settings: Any) -> None:
    with pytest.raises(UserError, match="cannot carry wire="):
        attach(exchange, lambda flat: Plain(SingleWorld(), settings, flat, NOMINAL))


@pytest.mark.parametrize("exchange", [Ddp(exchanges.Ddp(), NOMINAL), Horovod(exchanges.Horovod(), NOMINAL)], ids=type)
def test_a_wire_that_would_code_is_never_passed_over(exchange: Any) -> None:
    with pytest.raises(TypeError, match="sums by itself"):
        attach(exchange, lambda flat: Int8Wire(SingleWorld(), wires.Int8(), flat, NOMINAL))


def test_a_push_is_no_sum_that_a_wire_could_carry() -> None:
    with pytest.raises(UserError, match="wire=fp32"):
        attach(
            ParameterServer(exchanges.ParameterServer(), NOMINAL),
            lambda flat: Int8Wire(SingleWorld(), wires.Int8(), flat, NOMINAL),
        )


def test_ddp_refuses_a_rank_with_nothing_to_compute() -> None:
    """Its sums wait for a backward of every rank: the others would wait for ever."""

    def body(world: VirtualWorld) -> str:
        exchange = Ddp(exchanges.Ddp(), NOMINAL)
        exchange.world = world
        share = [Nothing()] if world.rank == 1 else [Nothing(inputs=torch.ones(1), tokens=1)] * 3
        with pytest.raises(UserError) as error:
            exchange._most(share)
        return str(error.value)

    assert all("a batch has nothing for rank 1" in said for said in virtual.run(3, body))


def test_settings_without_a_wire_are_an_error() -> None:
    class Morse(wires.Wire):
        pass

    with pytest.raises(TypeError, match="no wire has settings of the class Morse"):
        make_wire(Morse(), SingleWorld(), Flat(nn.Linear(3, 2), 1, 1), NOMINAL)
