"""A round of two ranks on one process: the other rank is our twin, so every sum is twice our own.

What is launched too early, too late, twice or under another name shows in the weights or in the log.
"""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hvdllm.exchange.allreduce import AllReduce
from hvdllm.exchange.base import State
from hvdllm.exchange.meta import SLOT
from hvdllm.exchange.parts import AllReduce as Settings
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.optim.parts import SGD
from hvdllm.optim.update import Update
from hvdllm.world.base import Asks
from hvdllm.world.single import Landed, SingleWorld


class Twin(SingleWorld):
    size = local_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def sum(self, x: torch.Tensor, name: str) -> Landed:
        self.log.append(name)
        return Landed(x.mul_(2))


class Other(SingleWorld):
    rank, size = 1, 3


class Run:
    """A net with an AllReduce of its own, and a stream of rounds of 7 examples in micro-batches of `cut`."""

    def __init__(self, world: Any, cut: int = 3, empty: bool = False) -> None:
        torch.manual_seed(0)
        self.world, self.cut, self.empty, self.round = world, cut, empty, 0
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.flat = Flat(self.model, world.size, 1)
        self.exchange = AllReduce(Settings(), 7)
        update = Update(SGD(lr=0.3, momentum=0.9, clip=0.2), lambda tokens: 1.0)
        self.exchange.attach(self.model, self.flat, update, Plain(world), world)
        self.note = getattr(world, "log", []).append
        self.commits: list[Any] = []
        self.reports: list[Any] = []

    def rounds(self, parts: int = 1) -> Iterator[list[Any]]:
        for t in itertools.count(self.round):
            draw = torch.Generator().manual_seed(t)
            parts_ = torch.randn(7, 4, generator=draw, dtype=torch.float64).split(self.cut)
            n = len(parts_)
            yield [SimpleNamespace(inputs=x, tokens=len(x), last=i == n - 1, round=t) for i, x in enumerate(parts_)]

    def nothing(self, parts: int = 1) -> Iterator[list[Any]]:
        return itertools.repeat([SimpleNamespace(inputs=None, tokens=0, last=True, round=0)])

    def train(self, steps: int) -> torch.Tensor:
        for batch in self.exchange.feed(SimpleNamespace(rounds=self.nothing if self.empty else self.rounds)):
            self.note("forward")
            loss = torch.zeros((), dtype=torch.float64)
            if batch.tokens:
                loss = self.model(batch.inputs).square().sum()
                loss.backward()
            self.note("advance")
            commit = self.exchange.advance(batch, loss.detach())
            if commit is not None:
                self.commits.append(commit)
                steps -= 1
                if steps == 0:
                    break
        return self.flat.x.clone()

    def losses(self) -> list[tuple[float, float, float]]:
        reports = [*(commit.before for commit in self.commits), self.exchange.settle().report]
        return [(r.loss_sum, r.loss_tokens, r.grad_norm) for r in reports if r is not None]


def test_two_equal_ranks_train_like_one() -> None:
    one, two = Run(SingleWorld(), cut=7), Run(Twin())
    for name in one.flat.at:
        assert torch.equal(one.flat.view(name), two.flat.view(name))
    one.train(5), two.train(5)
    for name in one.flat.at:
        torch.testing.assert_close(two.flat.view(name), one.flat.view(name), rtol=0, atol=1e-12)
    assert two.commits[-1].tokens == 2 * one.commits[-1].tokens == 70
    for (a_loss, a_tokens, a_norm), (b_loss, b_tokens, b_norm) in zip(one.losses(), two.losses(), strict=True):
        assert (b_loss, b_norm, b_tokens) == (pytest.approx(2 * a_loss), pytest.approx(a_norm), 2 * a_tokens)


def test_what_travels_in_a_round_and_when() -> None:
    run = Run(Twin())
    run.train(3)
    log = run.world.log
    # Each round: meta, two micro-batches that launch nothing, and the last, whose backward launches all buckets.
    for t, start in enumerate(range(0, len(log), len(log) // 3)):
        names = [f"grad.{bucket}.{t % 2}" for bucket in (2, 1, 0, 3)]
        begun = log[start : start + len(log) // 3]
        assert begun[0] == f"meta.{1 - t % 2}"
        assert begun[1:] == ["forward", "advance"] * 2 + ["forward", *names, "advance"]


def test_a_rank_without_a_share_launches_the_same() -> None:
    run, full = Run(Twin(), empty=True), Run(Twin())
    # The other ranks of this round have tokens, else there is nothing to divide by.
    run.world.sum = lambda x, name: (run.world.log.append(name), Landed(x.add_(1) if "meta" in name else x))[1]
    run.train(2), full.train(2)
    travelled = [[name for name in r.world.log if "." in name] for r in (run, full)]
    assert travelled[0] == travelled[1]
    assert run.world.log[1:3] == ["forward", "advance"], "nothing from hooks"


def test_asks_are_heard_at_the_second_mark_at_the_latest() -> None:
    run = Run(SingleWorld(), cut=7)
    run.train(1)
    run.world.asks.stop = True
    run.train(1)
    assert [commit.asks.stop for commit in run.commits] == [False, True]
    heard: list[Asks] = []
    feed = run.exchange.feed(SimpleNamespace(rounds=run.rounds))
    for k, batch in zip(range(3), feed, strict=False):
        run.world.asks.save = k == 0 or run.world.asks.save  # while the round is under way
        heard.append(run.exchange.advance(batch, torch.zeros(())).asks)
    assert heard == [Asks(), Asks(save=True), Asks()]


def test_nothing_was_done() -> None:
    settled = Run(SingleWorld()).exchange.settle()
    assert settled.report is None and settled.tokens == 0


# ------------------------------------------------------------------ going on
def test_a_state_goes_on_bit_equal() -> None:
    whole, begun, again = Run(SingleWorld()), Run(SingleWorld()), Run(SingleWorld())
    expected = whole.train(6)
    begun.train(3)
    state = begun.exchange.state()
    sharded = {name: vector.clone() for name, vector in state.sharded.items()}
    again.exchange.load(State(state.shared, [], sharded, {}), [state.mine])
    again.round = 3
    assert torch.equal(again.train(3), expected)
    assert whole.losses()[2:] == again.losses(), "with what was pending at the checkpoint"
    assert (again.commits[-1].tokens, again.commits[-1].step) == (42, 6)


def test_rank_0_hands_out_what_all_have() -> None:
    assert Run(SingleWorld()).exchange.state().spans and not Run(Other()).exchange.state().spans


def test_another_number_of_ranks() -> None:
    """Rank 0 speaks for all that were; at the same number each gets its own again."""
    said = [{"loss": 1.0 * r, "loss_tokens": 2.0 * r, "squares": 3.0 * r} for r in (1, 2, 3)]
    mine = [{"said": s, "slot": dict.fromkeys(SLOT, float(r))} for r, s in enumerate(said)]
    one, third = Run(SingleWorld()), Run(Other())
    state = one.exchange.state()
    one.exchange.load(State(state.shared, [], state.sharded, {}), mine)
    assert one.exchange.state().mine["said"] == {"loss": 6.0, "loss_tokens": 12.0, "squares": 18.0}
    state = third.exchange.state()
    third.exchange.load(State(state.shared, [], state.sharded, {}), mine)
    assert third.exchange.state().mine == mine[1]
    third.exchange.load(State(state.shared, [], state.sharded, {}), mine[:2])
    assert third.exchange.state().mine == mine[1], "rank 1 of another world leaves it to rank 0"
