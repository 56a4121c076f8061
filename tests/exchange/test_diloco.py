"""exchange=diloco against its outer steps by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import PLAIN
from local_kit import OPTIMS, by_hand, rate
from rig import Plain, steps_noted, train
from rig import own_gradient as gradient
from torch import nn

from hvdllm.exchange import diloco
from hvdllm.exchange.base import NotFinite
from hvdllm.exchange.parts import DiLoCo, outer_rate_below
from hvdllm.optim.parts import SGD


@pytest.mark.parametrize("optim", OPTIMS, ids=type)
@pytest.mark.parametrize(("groups", "pulses"), [(1, 1), (2, 2), (3, 1), (3, 4)])
def test_diloco_equals_its_outer_steps_by_hand(optim: Any, groups: int, pulses: int) -> None:
    anchors, tokens = by_hand(optim, groups, [4, 4, 4], 0.7, 0.9)
    marks = max(1, pulses - 1)
    rigs = train(DiLoCo(local_steps=4, pulses=pulses), groups, 3 * marks, optim=optim, rate=rate)
    for rig in rigs:
        for k in range(3):
            torch.testing.assert_close(rig.weights[(k + 1) * marks - 1], anchors[k], rtol=0, atol=1e-11)
            assert rig.commits[(k + 1) * marks - 1].tokens == tokens[k]
        torch.testing.assert_close(rig.final, anchors[-1], rtol=0, atol=1e-11)
        assert rig.settled.tokens == 0


def test_a_round_that_is_settled_early_is_a_shorter_one() -> None:
    anchors, tokens = by_hand(OPTIMS[1], 2, [6, 2], 0.7, 0.9)
    rigs = train(DiLoCo(local_steps=6, pulses=6), 2, 6, optim=OPTIMS[1], rate=rate)  # 5 marks, then one after 2 steps
    assert rigs[0].commits[-1].tokens + rigs[0].settled.tokens == tokens[-1]
    torch.testing.assert_close(rigs[1].final, anchors[-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("inner", ["allreduce", "sharded"])
def test_groups_are_replicas_of_several_ranks(inner: str) -> None:
    anchors, tokens = by_hand(OPTIMS[1], 2, [3, 3], 0.7, 0.9)
    exchange = DiLoCo(local_steps=3, pulses=2, inner=inner, group=2)
    rigs = train(exchange, 4, 2, optim=OPTIMS[1], rate=rate, acts=True)
    for rig in rigs:
        torch.testing.assert_close(rig.weights[-1], anchors[-1], rtol=0, atol=1e-11)
        assert rig.commits[-1].tokens == tokens[-1]
        report = rig.settled.report
        assert len(report.compute_s) == 4 and report.loss_tokens > 0


@pytest.mark.parametrize("pulses", [1, 3])
def test_overlap_applies_deltas_one_round_late(pulses: int) -> None:
    """A rate counts what is known: the last meeting but one, then the group's own times the groups. Seen to catch:
    deltas from the anchor as it is when they are applied, a rate without the round that travels, or that counts it
    twice."""
    anchors, tokens = by_hand(PLAIN, 3, [3] * 5, 0.2, 0.9, late=True)
    exchange = DiLoCo(local_steps=3, pulses=pulses, outer_lr=0.2, overlap=True)
    rigs = train(exchange, 3, 4 * pulses, optim=PLAIN, rate=rate)
    # With one pulse a round the commit of a round comes at the end of the next; the first round has none.
    at = 3 if pulses == 1 else 4 * pulses - 2
    torch.testing.assert_close(rigs[0].weights[at], anchors[at // pulses + (pulses == 1)], rtol=0, atol=1e-11)
    assert all(torch.equal(rig.final, rigs[0].final) for rig in rigs)
    assert len(tokens) == 5


@pytest.mark.parametrize("inner", ["allreduce", "sharded"])
@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_groups_go_on_from_mid_round(inner: str, wire: str) -> None:
    exchange = DiLoCo(local_steps=4, pulses=4, inner=inner, group=2, inner_wire=wire)
    whole = train(exchange, 4, 5, optim=OPTIMS[1], rate=rate)
    begun = train(exchange, 4, 5, optim=OPTIMS[1], rate=rate, stop_at=2, settle=False)
    again = train(exchange, 4, 5, optim=OPTIMS[1], rate=rate, states=[rig.state for rig in begun])
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.final, b.final)


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("late", [False, True])
def test_at_another_world_size_the_rate_goes_on_from_all_committed_tokens(
    late: bool, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: the tokens up to the last meeting, which is none in the first round."""
    exchange = DiLoCo(local_steps=3, pulses=3, outer_lr=0.2, overlap=True) if late else DiLoCo(local_steps=3, pulses=1)
    begun = train(exchange, 3, 9, optim=PLAIN, rate=rate, stop_at=stop, settle=False)
    stepped = steps_noted(monkeypatch)
    commits = train(exchange, 1, 9, optim=PLAIN, rate=rate, states=[each.state for each in begun])[0].commits
    assert len(commits) >= 5 and commits[0].tokens > begun[0].commits[-1].tokens
    assert stepped == sorted(stepped) and 0 < stepped[0] - begun[0].commits[-1].tokens <= 6, "a step's examples"
    assert {commit.tokens for commit in commits} <= set(stepped)


class Point(nn.Module):
    """f = |w|² / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))


def growth(exchange: Any, rounds: int) -> float:
    cost = lambda model, x, t: (model.w - 0 * t).square().sum() / 2  # noqa: E731
    optim = SGD(lr=1.0, momentum=0.0, clip=0.0)  # q = 1: a round ends at the optimum of the local objective
    try:
        rigs = train(exchange, 1, rounds, optim=optim, model=Point, cost=cost, acts=True, micro=6)
    except NotFinite:
        return float("inf")
    sizes = [w.abs().max().item() for w in rigs[0].kept]
    return max(sizes[-rounds // 4 :]) / max(sizes[rounds // 4 : rounds // 2])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("late", [False, True])
def test_the_outer_step_is_stable_below_its_bound_and_not_above(momentum: float, late: bool) -> None:
    bound = outer_rate_below(momentum, late)
    known = {0.0: (2.0, 1.0), 0.5: (1.5, 0.5616), 0.9: (1.3571, 0.2531)}[momentum]
    assert bound == pytest.approx(known[late], abs=1e-4)

    def at(lr: float) -> float:
        exchange = DiLoCo(local_steps=1, pulses=1, outer_lr=lr, outer_momentum=momentum, overlap=late)
        return growth(exchange, 400)

    assert at(0.96 * bound) < 1 < at(1.04 * bound)


def uneven(monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """Groups that make so many steps a round, as exchange.by_speed comes to."""

    class Uneven(diloco.DiLoCo):
        def attach(self, *parts: Any) -> nn.Module:
            module = super().attach(*parts)
            self.meetings.pace.planned = steps
            return module

    monkeypatch.setattr(diloco, "DiLoCo", Uneven)


@pytest.mark.parametrize("pulses", [1, 2])
def test_deltas_are_normalised_by_steps_and_weighted_by_tokens_a_step(
    pulses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d = (sum t H / sum t) (sum t (anchor - x) / H) / sum t, with t = tokens / H."""
    steps = [2, 4, 3]
    uneven(monkeypatch, steps)
    anchor, taken, tokens = Plain(PLAIN).x, [0, 0, 0], 0
    for _ in range(3):
        scaled, weight, weighted = torch.zeros_like(anchor), 0.0, 0.0
        for i, count in enumerate(steps):
            x, own = anchor.clone(), 0
            for _ in range(count):
                g, n = gradient(x, i, taken[i])
                x, own, taken[i] = x - PLAIN.lr * g / n, own + n, taken[i] + 1
            t, tokens = own / count, tokens + own
            scaled, weight, weighted = scaled + t * (anchor - x) / count, weight + t, weighted + t * count
        anchor = anchor - 0.5 * weighted / weight * scaled / weight
    exchange = DiLoCo(local_steps=4, pulses=pulses, outer_lr=0.5, outer_momentum=0.0)
    for rig in train(exchange, 3, 3, optim=PLAIN):
        torch.testing.assert_close(rig.weights[-1], anchor, rtol=0, atol=1e-11)
        assert rig.commits[-1].tokens == tokens


def test_normalised_deltas_keep_the_fixed_point_of_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 2 and 30 steps with a quarter and three quarters of the examples: near the optimum, where deltas that
    are not normalised (30 steps heard 15 times as much) would rest beyond the half of the way to the busier group's."""
    uneven(monkeypatch, [2, 30])
    goals, eta = (1.0, -0.6), 0.01

    def data(group: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.ones((1, 3)[group], 1, dtype=torch.float64)
        return like, goals[group] * like

    def rest(q: list[float]) -> float:
        return (0.25 * q[0] * goals[0] + 0.75 * q[1] * goals[1]) / (0.25 * q[0] + 0.75 * q[1])

    cost = lambda model, x, t: ((model.w[:1] - t) ** 2).sum() / 2  # noqa: E731
    optim = SGD(lr=eta, momentum=0.0, clip=0.0)
    exchange = DiLoCo(local_steps=30, pulses=1, outer_lr=1.0, outer_momentum=0.0)
    found = train(exchange, 2, 100, optim=optim, model=Point, cost=cost, data=data, micro=6)[0].final[0].item()
    q = [1 - (1 - eta) ** count for count in (2, 30)]
    assert found == pytest.approx(rest([q[0] / 2, q[1] / 30]), abs=1e-8)
    optimum, plain = rest([1.0, 1.0]), rest(q)
    assert abs(found - optimum) < 0.05 < 0.3 < abs(plain - optimum)
