"""Evaluation over a fixed prefix of the held-out items."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hvdllm import pulse
from hvdllm.plain import Json, Tree
from hvdllm.settings import Config
from hvdllm.task.base import Items, Prepared, Task
from hvdllm.task.stream import held_out
from hvdllm.trainer.backward import autocast
from hvdllm.world.base import World


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: the results by name, such as loss (in nats a unit) and bits_per_byte.
        tokens: how many units were evaluated.
    """

    metrics: dict[str, float]
    tokens: int

    @property
    def loss(self) -> float:
        """Mean loss in nats a unit."""
        return self.metrics["loss"]

    def state(self) -> Json:
        """Plain values for the checkpoint."""
        return {**self.metrics, "tokens": self.tokens}

    @staticmethod
    def of(state: Json) -> Evaluation:
        """The inverse of `state`. Raises ValueError, TypeError or KeyError if the values are not numbers."""
        return Evaluation({name: float(value) for name, value in state.items() if name != "tokens"}, state["tokens"])


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Iterable[tuple[Tree, Tree]],
    precision: str,
    device: torch.device,
    world: World,
) -> Evaluation:
    """The results over the batches of all ranks. Collective.

    Sums are taken in float64 over all ranks, and divided once. The model is left in the mode in which it was found.

    Args:
        task: what is measured.
        model: the model.
        batches: this rank's (inputs, targets).
        precision: as `autocast` takes it.
        device: where the model lies.
        world: the ranks.
    """
    was = model.training
    model.eval()
    sums = torch.zeros(task.measures, dtype=torch.float64, device=device)
    for inputs, targets in batches:
        pulse.enter("evaluation")
        with autocast(precision, device):
            sums += task.measure(model, inputs, targets)
    model.train(was)
    found: list[float] = world.sum(sums.cpu(), "act.evaluate").land().tolist()
    return Evaluation(task.metrics(found), int(found[1]))


def evaluate_run(
    config: Config, model: nn.Module, data: Prepared, device: torch.device, world: World
) -> Evaluation | None:
    """Evaluates the model as a run with these settings does; None if there is nothing to evaluate yet. Collective.

    Data of several sources are evaluated source by source. Each has its share of eval_tokens, and a result of the whole
    is the mean of those of the sources, weighted by their shares. The results of a source have its name after a slash,
    such as `loss/code`.
    """

    def of(task: Task, items: Items, units: int) -> Evaluation:
        batches = held_out(
            items, units=units, micro_batch=config.micro_batch, rank=world.rank, size=world.size, device=device
        )
        return evaluate(task, model, batches, config.precision, device, world)

    if data.sources is None:
        return of(data.task, data.validation, config.eval_tokens)
    sources = data.sources(world)
    asked = {name: math.ceil(config.eval_tokens * each.share) for name, each in sources.items()}
    found = {name: of(each.task, each.items, asked[name]) for name, each in sources.items()}
    if not found:
        return None
    apart = {f"{key}/{name}": value for name, one in found.items() for key, value in one.metrics.items()}
    whole = dict[str, float]()
    for name, one in found.items():
        for key, value in one.metrics.items():
            whole[key] = whole.get(key, 0.0) + sources[name].share * value
    return Evaluation({**whole, **apart}, sum(one.tokens for one in found.values()))


def told(task: Task, result: Evaluation) -> str:
    """The results beside the loss in words, with the loss of each source."""
    apart = {name.partition("/")[2]: value for name, value in result.metrics.items() if name.startswith("loss/")}
    few = list(apart.items()) if len(apart) <= 6 else [*apart.items()][:: len(apart) - 1]  # of many the first and last
    words = [task.tell(result.metrics), ", ".join(f"{name} {value:.4f}" for name, value in few)]
    return "; ".join(filter(None, words))
