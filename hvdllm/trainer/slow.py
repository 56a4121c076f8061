"""At which speed a rank computes: a real one slower than it could, for experiments, or a logical one by the clock.

Both stand around the module that the loop calls and act before its forward, so that a micro-batch's gradients come,
and what its hooks launch leaves, as late as from a rank of that speed. Weights are those of the module alone, bit for
bit: no gradient, buffer or random number is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hvdllm import device as devices
from hvdllm.config import pace
from hvdllm.device import now
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.trainer.backward import Loss
from hvdllm.world.base import World
from hvdllm.world.virtual import VirtualWorld


class Slow(nn.Module):
    """factor: how many times as long a micro-batch takes. loss: the bare module that does its work once more.

    asleep: by sleeping, where other ranks need the cores. It goes by the micro-batch before; the first is not slowed.
    """

    def __init__(self, module: nn.Module, loss: nn.Module, factor: float, asleep: bool) -> None:
        super().__init__()
        self.module, self.loss, self.factor, self.asleep = module, loss, factor, asleep
        self.weights = list(loss.parameters())
        self._owed = 0.0  # sequences
        self._began = self._took = 0.0  # forward and backward of the last micro-batch, seconds
        if asleep:
            # Of the first tensor in the order of the forward: the backward ends with it.
            self.weights[0].register_post_accumulate_grad_hook(self._ended)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
        if self.asleep:
            time.sleep((self.factor - 1) * self._took)
            self._began = now()
        else:
            self._work(inputs, targets, place)
        loss: torch.Tensor = self.module(inputs, targets, place)
        return loss

    def _ended(self, weight: torch.Tensor) -> None:
        self._took = now() - self._began

    def _work(self, inputs: torch.Tensor, targets: torch.Tensor, place: tuple[int, int]) -> None:
        """factor - 1 times the forward and backward of this micro-batch, thrown away; what is less than a sequence is
        owed to the next one."""
        self._owed += (self.factor - 1) * len(inputs)
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            while self._owed >= 1:
                rows = min(len(inputs), int(self._owed))
                # Not backward(): no gradient is accumulated and no hook of one called.
                torch.autograd.grad(self.loss(inputs[:rows], targets[:rows], place), self.weights)
                self._owed -= rows


class Simulated(nn.Module):
    """tokens_per_s: of this rank. spend: lets its time pass. jitter: each micro-batch takes 1 + jitter X times as long,
    X from a Pareto distribution of index 2 and mean 1, whose variance is infinite; a function of seed, rank and the
    micro-batch's place, so a run resumed in mid-way has the same."""

    def __init__(
        self,
        module: nn.Module,
        spend: Callable[[float], None],
        tokens_per_s: float,
        jitter: float,
        seed: int,
        rank: int,
    ) -> None:
        super().__init__()
        self.module, self.spend, self.tokens_per_s = module, spend, tokens_per_s
        self.jitter, self.seed, self.rank = jitter, seed, rank

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
        self.spend(inputs.numel() / self.tokens_per_s * self._hiccup(place))
        loss: torch.Tensor = self.module(inputs, targets, place)
        return loss

    def _hiccup(self, place: tuple[int, int]) -> float:
        if not self.jitter:
            return 1.0
        draw = int(np.random.SeedSequence([self.seed, self.rank, *place]).generate_state(1)[0]) / 2**32
        return 1.0 + self.jitter * float((1.0 - draw) ** -0.5 - 1.0)


def paced(
    config: Config,
    module: torch.nn.Module,
    loss: Loss,
    hosts: list[Json],
    device: torch.device,
    world: World,
) -> torch.nn.Module:
    """What the loop calls, as fast as the settings say that this rank is."""
    if config.world.tokens_per_s is not None:
        assert isinstance(world, VirtualWorld)
        speed = pace.speeds(config.world, config.seed)[world.rank]
        return Simulated(module, world.spend, speed, config.world.jitter, config.seed, world.rank)
    factor = pace.slowed(config.world.slow, world.size).get(world.rank, 1.0)
    return Slow(module, loss, factor, crowded(hosts, world.rank, device)) if factor > 1 else module


def crowded(hosts: list[Json], rank: int, device: torch.device) -> bool:
    """Would more compute on this rank slow others? Hosts of the network lab share one machine and its name."""
    here = sum(one["host"] == hosts[rank]["host"] for one in hosts)
    return device.type == "cpu" and here > devices.usable_cores()
