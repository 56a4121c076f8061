"""The parts of a synchronous round, on one process; real ranks are in test_rounds_on_ranks.py."""

import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hvdllm.exchange.allreduce import AllReduce
from hvdllm.exchange.base import NotFinite
from hvdllm.exchange.buckets import Buckets
from hvdllm.exchange.meta import MetaPost
from hvdllm.exchange.parts import AllReduce as Settings
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.optim.parts import SGD
from hvdllm.optim.update import Update
from hvdllm.world.base import Asks
from hvdllm.world.single import Landed, SingleWorld

SLOT = {"compute_s": 0.0, "blocked_s": 0.0, "flight_s": 0.0, "cpu_s": 0.0, "micro_batches": 0.0}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()


@pytest.mark.parametrize("seed", range(5))
def test_buckets_are_launched_in_one_order_whatever_the_order_of_hooks(seed: int) -> None:
    flat = Flat(net(), 1, 1)
    launched: list[int] = []
    buckets = Buckets(flat, lambda bucket: launched.append(bucket.index) or Landed(flat.g))
    (handles := buckets.hook(flat))
    buckets.arm(False)
    flat.parameters["0.weight"].sum().backward()
    assert not launched, "not armed: an earlier micro-batch"
    buckets.arm(True)
    names = random.Random(seed).sample(sorted(flat.parameters), len(flat.parameters) - 1)
    for name in names:
        flat.parameters[name].sum().backward()
    early = list(launched)
    assert len(buckets.launch_rest()) == len(flat.buckets)
    assert launched == [2, 1, 0, 3] and early == launched[: len(early)]
    for handle in handles:
        handle.remove()


def test_a_whole_backward_launches_everything_from_hooks() -> None:
    model = net()
    flat = Flat(model, 1, 1)
    launched: list[int] = []
    buckets = Buckets(flat, lambda bucket: launched.append(bucket.index) or Landed(flat.g))
    buckets.hook(flat)
    for _ in range(2):
        buckets.arm(True)
        model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        assert launched == [2, 1, 0, 3]
        buckets.launch_rest()
        launched.clear()


def test_meta_is_exact_and_gathers() -> None:
    class Third(SingleWorld):
        rank, size = 2, 3

    world = Third()
    world.asks = Asks(save=True)
    post = MetaPost(
        world, 0, {"tokens": 2.0**24 + 1, "loss": 0.1, "loss_tokens": 3.0, "squares": 0.5}, {**SLOT, "blocked_s": 7.0}
    )
    said = post.land()
    assert said.tokens == 2**24 + 1 and said.loss == 0.1 and said.squares == 0.5
    assert said.slots["blocked_s"] == [0.0, 0.0, 7.0] and said.slots["compute_s"] == [0.0] * 3
    assert said.asks == Asks(stop=False, save=True) and world.asks == Asks()


# ------------------------------------------------------------------ whole rounds
def batches(round: int, cut: int) -> list[Any]:
    """22 examples in micro-batches of `cut`."""
    draw = torch.Generator().manual_seed(round)
    x = torch.randn(22, 4, generator=draw, dtype=torch.float64)
    parts = x.split(cut)
    return [
        SimpleNamespace(inputs=part, tokens=len(part), last=i == len(parts) - 1, round=round, index=i)
        for i, part in enumerate(parts)
    ]


def run(cut: int, acts: bool = False, bad: int | None = None, steps: int = 6) -> tuple[torch.Tensor, list[Any]]:
    model = net()
    flat, world = Flat(model, 1, 1), SingleWorld()
    update, exchange = Update(SGD(lr=0.1, momentum=0.9, clip=0.05), lambda tokens: 1.0), AllReduce(Settings(), 22)
    exchange.attach(model, flat, update, Plain(world), world)

    def rounds(parts: int = 1) -> Iterator[list[Any]]:
        for t in itertools.count():
            yield batches(t, cut)

    commits: list[Any] = []
    for batch in exchange.feed(SimpleNamespace(rounds=rounds)):
        loss = model(batch.inputs).square().sum()
        if batch.round == bad:
            loss = loss * float("inf")
        loss.backward()
        commit = exchange.advance(batch, loss.detach())
        if commit is not None:
            commits.append(commit)
            if acts:
                exchange.state()
                with exchange.consensus():
                    pass
            if len(commits) == steps:
                break
    commits.append(exchange.settle().report)
    return flat.x.clone(), commits


def test_accumulation_equals_one_large_batch() -> None:
    one, _ = run(22)
    for cut in (1, 5, 21):
        assert torch.allclose(run(cut)[0], one, atol=1e-12, rtol=0)
    assert not torch.allclose(run(22, steps=5)[0], one, atol=1e-4)


def test_a_commit_knows_what_came_of_the_one_before() -> None:
    _, (first, second, *_, report) = run(5)
    assert first.before is None and (first.tokens, second.tokens, second.step) == (22, 44, 2)
    model = net()
    loss = sum(model(batch.inputs).square().sum().item() for batch in batches(0, 5))
    assert second.before.loss_sum == pytest.approx(loss) and second.before.loss_tokens == 22
    assert second.before.micro_batches == [5] and report.loss_tokens == 22
    assert report.loss_sum < second.before.loss_sum


def test_acts_change_nothing() -> None:
    assert torch.equal(run(5)[0], run(5, acts=True)[0])


@pytest.mark.parametrize("acts", [False, True])
def test_a_loss_that_is_not_finite_stops_before_the_update(acts: bool) -> None:
    with pytest.raises(NotFinite, match="step 4") as error:
        run(5, acts, bad=3)
    assert error.value.rounds == [3] and error.value.parts == 1
