"""The speed of a rank, for experiments: a real rank is slowed down, and a logical rank computes by a simulated clock.

Both are modules around the one that the loop calls. They act before its forward pass, so gradients come, and what hooks
launch leaves, as late as from a rank of that speed. No gradient, buffer or random number is touched, so weights are bit
for bit those of the module alone.
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
    """A module that takes longer than the one within it.

    Args:
        module: what the loop would call.
        loss: the bare module without hooks, which does the extra work.
        factor: how many times as long a micro-batch takes.
        asleep: whether to sleep instead of computing, because other ranks need the cores. The sleep is as long as the
          micro-batch before asks for, so the first one is not slowed.
    """

    def __init__(self, module: nn.Module, loss: nn.Module, factor: float, asleep: bool) -> None:
        super().__init__()
        self.module, self.loss, self.factor, self.asleep = module, loss, factor, asleep
        self.weights = [p for p in loss.parameters() if p.requires_grad]
        self._owed = 0.0  # sequences that are still to be computed once more
        self._began = self._took = 0.0  # forward and backward of the last micro-batch, seconds
        if asleep:
            # The backward pass ends with the first tensor in the order of the forward pass.
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
        """Computes this micro-batch factor - 1 more times and throws the gradients away. Less than a whole sequence is
        left for the next micro-batch."""
        self._owed += (self.factor - 1) * len(inputs)
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            while self._owed >= 1:
                rows = min(len(inputs), int(self._owed))
                # Unlike backward(), this accumulates no gradient and calls no hook.
                torch.autograd.grad(self.loss(inputs[:rows], targets[:rows], place), self.weights)
                self._owed -= rows


class Simulated(nn.Module):
    """A module that spends simulated time before each forward pass.

    With jitter, a micro-batch takes 1 + jitter X times as long. X is drawn from a Pareto distribution of index 2 and
    mean 1, whose variance is infinite. It depends on the seed, the rank and the micro-batch's place, so a resumed run
    draws the same.

    Args:
        module: what the loop would call.
        spend: lets that many seconds pass on the simulated clock.
        tokens_per_s: speed of this rank.
        jitter: see above.
        seed: of the run.
        rank: this rank.
    """

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
        self.spend(int((targets >= 0).sum()) / self.tokens_per_s * self._hiccup(place))
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
    """The module that the loop calls: `module` itself, or one around it with the speed that the settings ask for."""
    if config.world.tokens_per_s is not None:
        assert isinstance(world, VirtualWorld)
        speed = pace.speeds(config.world, config.seed)[world.rank]
        return Simulated(module, world.spend, speed, config.world.jitter, config.seed, world.rank)
    factor = pace.slowed(config.world.slow, world.size).get(world.rank, 1.0)
    return Slow(module, loss, factor, crowded(hosts, world.rank, device)) if factor > 1 else module


def crowded(hosts: list[Json], rank: int, device: torch.device) -> bool:
    """Whether more compute on this rank would slow others down, since ranks outnumber cores. The network lab's hosts
    are on one machine and share its name, so they count as one host."""
    here = sum(one["host"] == hosts[rank]["host"] for one in hosts)
    return device.type == "cpu" and here > devices.usable_cores()
