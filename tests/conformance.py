"""What mypy proves of every registered part: that it satisfies its protocol. test_registry.py sees that none is
missing.

Each list is typed by the protocol's own maker, so that a class without a method, or with one of other parameters, does
not pass `mypy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdllm.exchange import (
    acco,
    allreduce,
    ddp,
    delayed,
    diloco,
    fedavg,
    horovod,
    local_sgd,
    parameter_server,
    sharded,
    streaming_diloco,
)
from hvdllm.exchange.base import Exchange, Wire
from hvdllm.exchange.wire import coded, plain, powersgd
from hvdllm.launch import horovodrun, local, ray, slurm
from hvdllm.launch.base import Launcher
from hvdllm.optim import adamw, nadam, schedule, sgd
from hvdllm.optim.base import Optimizer
from hvdllm.settings import Setup
from hvdllm.task import causal_lm, images, masked_lm, ratings
from hvdllm.task.base import Kind
from hvdllm.text import corpus, mix, tokens
from hvdllm.track import tensorboard, wandb
from hvdllm.track.base import Make
from hvdllm.world import hvd, single, torch, virtual
from hvdllm.world.base import World
from hvdllm.world.detect import Place

EXCHANGES: list[Callable[[Any, int], Exchange]] = [
    allreduce.AllReduce, sharded.Sharded, delayed.Delayed, acco.Acco, local_sgd.LocalSGD, diloco.DiLoCo,
    streaming_diloco.StreamingDiLoCo, fedavg.FedAvg, parameter_server.ParameterServer, ddp.Ddp, horovod.Horovod,
]  # fmt: skip
WIRES: list[Callable[[Any, Any, Any, int], Wire]] = [
    plain.Plain, coded.Fp16Wire, coded.Bf16Wire, coded.Int8Wire, coded.TopKWire, coded.SignWire, powersgd.PowerSGDWire,
]  # fmt: skip
OPTIMIZERS: list[Optimizer] = [adamw, nadam, sgd]
SCHEDULES: list[Callable[[Any, int, schedule.Way], float]] = [
    schedule.constant, schedule.cosine, schedule.infinite, schedule.wsd,
]  # fmt: skip
TASKS: list[Kind] = [causal_lm, masked_lm, images, ratings]
SOURCES: list[Callable[[Any], list[Any]]] = [
    corpus.stdlib, corpus.files, corpus.packed, corpus.chats, tokens.files, mix.files, corpus.streamed,
]  # fmt: skip
TRANSPORTS: list[Callable[[Setup, Place], World]] = [single.opened, hvd.opened, torch.opened]
LOGICAL = [virtual.run]  # many ranks at once, each with a VirtualWorld
RANK_OF_MANY: Callable[..., World] = virtual.VirtualWorld
LAUNCHERS: list[Launcher] = [local, horovodrun, slurm, ray]
TRACKERS: list[Make] = [wandb.make, tensorboard.make]

ALL: dict[str, list[Any]] = {
    "task": [*TASKS], "exchange": [*EXCHANGES], "wire": [*WIRES], "optim": [*OPTIMIZERS],
    "schedule": [*SCHEDULES], "text": [*SOURCES], "transport": [*TRANSPORTS, *LOGICAL],
    "launch": [*LAUNCHERS], "track": [*TRACKERS],
}  # fmt: skip
