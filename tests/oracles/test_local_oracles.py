"""Local steps, their meetings and their outer optimizers against plain references, on virtual ranks.

Every group has its own data, another number of examples in every step, several buckets.

Seen to catch, a line broken at a time: weights of one, deltas that are not normalised by steps, an outer momentum that
is not in the checkpoint, deltas from an anchor that has moved, rates and tokens of the anchor that lag, parts sent at
each other's time, weights of their own at another world size, several ranks of a group that all speak.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rig import Plain, loss, net, own_examples, put, steps_noted, train
from rig import own_gradient as gradient
from torch import nn

from hvdllm.exchange import diloco
from hvdllm.exchange.base import NotFinite
from hvdllm.exchange.local_rounds import Steps, steps_by_speed
from hvdllm.exchange.parts import DiLoCo, LocalSGD, StreamingDiLoCo, outer_rate_below
from hvdllm.optim.parts import SGD, AdamW

OPTIMS = [
    SGD(lr=0.02, momentum=0.9, clip=1.0, weight_decay=0.1), AdamW(lr=0.01, clip=1.0, weight_decay=0.1),
]  # fmt: skip
PLAIN = SGD(lr=0.05, momentum=0.0, clip=0.0)


def rate(tokens: int) -> float:
    return 1.0 / (1 + tokens / 200)


class Replica(Plain):
    """A group on its own."""

    def __init__(self, optim: Any, group: int, rate: Callable[[int], float]) -> None:
        super().__init__(optim, rate)
        self.group, self.taken = group, 0

    def local(self, base: int, groups: int, open: int) -> int:
        """One step at the rate of base + groups x own tokens since; the examples it took."""
        total, count = gradient(self.x, self.group, self.taken)
        self.tokens = base + groups * (open + count) - count  # `step` adds its own
        self.step(total, count)
        self.taken += 1
        return count


def by_hand(
    optim: Any, groups: int, steps: list[int], lr: float, momentum: float, rate: Callable[[int], float] = rate,
    late: bool = False,
) -> tuple[list[torch.Tensor], list[int]]:  # fmt: skip
    """Anchors after rounds of so many steps each, and the tokens then. late: deltas are applied one round after."""
    replicas = [Replica(optim, group, rate) for group in range(groups)]
    anchor = replicas[0].x
    velocity, tokens, exact, before = torch.zeros_like(anchor), 0, 0, None
    anchors, counts = [], []
    bases = [0] * groups
    for count in steps:
        taken = [0] * groups
        for i, _ in itertools.product(range(groups), range(count)):
            taken[i] += replicas[i].local(bases[i], groups, taken[i])
        delta = sum(n * (anchor - r.x) for n, r in zip(taken, replicas, strict=True)) / sum(taken)
        tokens += sum(taken)
        bases = [tokens] * groups
        now, before = (before, delta) if late else (delta, None)
        if now is not None:
            velocity = momentum * velocity + now
            anchor = anchor - lr * (now + momentum * velocity)
        if late:
            bases = [exact + groups * n for n in taken]
            exact = tokens
        for replica in replicas:
            put(replica.model, anchor)
        anchors.append(anchor)
        counts.append(tokens)
    return anchors, counts


# ------------------------------------------------------------------ update rules
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


def test_weights_to_keep_say_of_which_tokens_they_are() -> None:
    """In mid-round those of the last meeting. Seen to catch: not moved with the anchor."""
    rig = train(DiLoCo(local_steps=4, pulses=3), 2, 6, optim=PLAIN, acts=True)[1]
    tokens = [0, *(c.tokens for c in rig.commits)]
    assert rig.of == [tokens[0], tokens[2], tokens[2], tokens[4], tokens[4], tokens[6]]
    for exchange in (
        DiLoCo(local_steps=3, pulses=1, outer_lr=0.2, overlap=True),
        StreamingDiLoCo(local_steps=4, fragments=2, delay=1),
    ):  # fmt: skip
        rig = train(exchange, 2, 4, optim=PLAIN, acts=True)[1]
        assert rig.of == [c.tokens for c in rig.commits]
    assert train(LocalSGD(local_steps=2), 2, 3, optim=PLAIN, acts=True)[0].of == [None] * 3


def test_a_round_that_is_settled_early_is_a_shorter_one() -> None:
    anchors, tokens = by_hand(OPTIMS[1], 2, [6, 2], 0.7, 0.9)
    rigs = train(DiLoCo(local_steps=6, pulses=6), 2, 6, optim=OPTIMS[1], rate=rate)  # 5 marks, then one after 2 steps
    assert rigs[0].commits[-1].tokens + rigs[0].settled.tokens == tokens[-1]
    torch.testing.assert_close(rigs[1].final, anchors[-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("warmup", [0, 30])
def test_local_sgd_takes_the_mean_of_the_weights(warmup: int) -> None:
    """Synchronous at first (post-local); evaluation sees the mean of the weights, in mid-round too."""
    size, exchange = 3, LocalSGD(local_steps=3, warmup_tokens=warmup, pulses=3)
    ones = 0 if warmup == 0 else 2  # rounds of one step, of about 15 examples
    anchors, tokens = by_hand(OPTIMS[1], size, [1] * ones + [3, 3], 1.0, 0.0)
    rigs = train(exchange, size, ones + 4, optim=OPTIMS[1], rate=rate, acts=True)
    torch.testing.assert_close(rigs[0].weights[-1], anchors[-1], rtol=0, atol=1e-11)
    assert rigs[0].commits[-1].tokens == tokens[-1]
    middle = ones  # the first mark of the first long round: after two of its three steps
    mean = torch.stack([rig.weights[middle] for rig in rigs]).mean(0)
    assert not torch.equal(rigs[0].weights[middle], rigs[1].weights[middle])
    for rig in rigs:
        torch.testing.assert_close(rig.kept[middle], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exchange", [DiLoCo(local_steps=1, outer_lr=1.0, outer_momentum=0.0), LocalSGD(local_steps=1)])
def test_one_plain_step_and_an_outer_rate_of_one_are_synchronous_descent(exchange: Any) -> None:
    plain = Plain(PLAIN, rate)
    expected = []
    for t in range(5):
        both = [gradient(plain.x, group, t) for group in range(3)]
        expected.append(plain.step(sum(g for g, _ in both), sum(n for _, n in both)))
    rigs = train(exchange, 3, 5, optim=PLAIN, rate=lambda tokens: 1.0)
    plain = Plain(PLAIN)
    for t in range(5):
        both = [gradient(plain.x, group, t) for group in range(3)]
        x = plain.step(sum(g for g, _ in both), sum(n for _, n in both))
        torch.testing.assert_close(rigs[2].weights[t], x, rtol=0, atol=1e-11)


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


# ------------------------------------------------------------------ streaming
def streaming_by_hand(
    groups: int, H: int, parts: list[slice], tau: int, alpha: float, lr: float, momentum: float, steps: int
) -> torch.Tensor:
    """The anchor after so many local steps, under plain descent at a constant rate."""
    xs = [Plain(PLAIN).x for _ in range(groups)]
    anchor = xs[0].clone()
    velocity, air = torch.zeros_like(anchor), None
    own = [[0] * len(parts) for _ in range(groups)]

    def join() -> None:
        nonlocal velocity, anchor
        assert air is not None
        part, delta = air[1], air[2]
        u = momentum * velocity[part] + delta
        velocity[part], anchor[part] = u, anchor[part] - lr * (delta + momentum * u)
        for x in xs:
            x[part] = (1 - alpha) * anchor[part] + alpha * x[part]

    for h in range(1, steps + 1):
        for i, x in enumerate(xs):
            g, n = gradient(x, i, h - 1)
            x -= PLAIN.lr * g / n
            own[i] = [each + n for each in own[i]]
        if air is not None and h == air[0] + tau:
            join()
        for p, part in enumerate(parts):
            if h % H == p * H // len(parts):
                weights = [own[i][p] for i in range(groups)]
                delta = sum(w * (anchor[part] - x[part]) for w, x in zip(weights, xs, strict=True)) / sum(weights)
                air = (h, part, delta)
                for each in own:
                    each[p] = 0
                if tau == 0:
                    join()
    return anchor


def test_streaming_whole_and_at_once_is_diloco() -> None:
    whole = train(DiLoCo(local_steps=4, pulses=1), 3, 3, optim=OPTIMS[1], rate=rate)
    stream = StreamingDiLoCo(local_steps=4, fragments=1, delay=0, mixing=0.0)
    rigs = train(stream, 3, 3, optim=OPTIMS[1], rate=rate)
    assert torch.equal(rigs[1].final, whole[1].final)
    assert [c.tokens for c in rigs[0].commits] == [c.tokens for c in whole[0].commits]


@pytest.mark.parametrize(("tau", "alpha"), [(0, 0.0), (1, 0.5), (2, 0.25)])
def test_streaming_follows_its_rule(tau: int, alpha: float) -> None:
    """Two parts: the two first matrices, the last one and the vectors. Joined at steps 3 + τ, 6 + τ, 9 + τ."""
    sizes = [p.numel() for p in net().parameters()]
    model = net()
    names = [name for name, _ in model.named_parameters()]
    places = dict(zip(names, itertools.accumulate([0, *sizes]), strict=False))
    exchange = StreamingDiLoCo(local_steps=6, fragments=2, delay=tau, mixing=alpha, outer_lr=0.5)
    rigs = train(exchange, 2, 3, optim=PLAIN, acts=True, settle=False)
    # The map is cut where the tests' tiny buckets allow, so the parts are asked for, not assumed.
    cut = rigs[0].fragments
    order = [torch.cat([torch.arange(places[n], places[n] + sizes[names.index(n)]) for n in part]) for part in cut]
    mask = [torch.zeros(sum(sizes), dtype=torch.bool).index_fill_(0, each, True) for each in order]
    anchor = streaming_by_hand(2, 6, mask, tau, alpha, 0.5, 0.9, 9 + tau)  # type: ignore[arg-type]
    torch.testing.assert_close(rigs[0].kept[-1], anchor, rtol=0, atol=1e-11)


# ------------------------------------------------------------------ acts, resuming, other sizes
EVERY = [
    DiLoCo(local_steps=4, pulses=4),
    DiLoCo(local_steps=3, pulses=1),
    DiLoCo(local_steps=4, pulses=2, outer_lr=0.2, overlap=True),
    DiLoCo(local_steps=3, pulses=1, outer_lr=0.2, overlap=True),
    LocalSGD(local_steps=4, pulses=4, warmup_tokens=20),
    StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
    StreamingDiLoCo(local_steps=4, fragments=2, delay=0, mixing=0.0),
]


@pytest.mark.parametrize("exchange", EVERY, ids=repr)
def test_acts_change_nothing_and_a_resumed_run_is_bit_equal(exchange: Any) -> None:
    for size in (2, 3):
        whole = train(exchange, size, 7, optim=OPTIMS[1], rate=rate)
        acting = train(exchange, size, 7, optim=OPTIMS[1], rate=rate, acts=True)
        for stop in (1, 2, 3, 5):
            begun = train(exchange, size, 7, optim=OPTIMS[1], rate=rate, stop_at=stop, settle=False)
            again = train(exchange, size, 7, optim=OPTIMS[1], rate=rate, states=[rig.state for rig in begun])
            for a, b, c in zip(whole, again, acting, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a.weights[stop:], b.weights, strict=True))
                assert all(torch.equal(x, y) for x, y in zip(a.weights, c.weights, strict=True))
                assert torch.equal(a.final, b.final) and torch.equal(a.final, c.final)
                assert [x.tokens for x in a.commits[stop:]] == [x.tokens for x in b.commits]
                said = [(r.before.loss_sum, r.before.loss_tokens) for r in a.commits[stop:]]
                assert said == [(r.before.loss_sum, r.before.loss_tokens) for r in b.commits]
                assert a.settled.tokens == b.settled.tokens == c.settled.tokens


@pytest.mark.parametrize("inner", ["allreduce", "sharded"])
@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_groups_go_on_from_mid_round(inner: str, wire: str) -> None:
    exchange = DiLoCo(local_steps=4, pulses=4, inner=inner, group=2, inner_wire=wire)
    whole = train(exchange, 4, 5, optim=OPTIMS[1], rate=rate)
    begun = train(exchange, 4, 5, optim=OPTIMS[1], rate=rate, stop_at=2, settle=False)
    again = train(exchange, 4, 5, optim=OPTIMS[1], rate=rate, states=[rig.state for rig in begun])
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.final, b.final)


@pytest.mark.parametrize("exchange", EVERY, ids=repr)
def test_pulses_are_exact_and_losses_add_up(exchange: Any) -> None:
    rigs = train(exchange, 3, 6, optim=OPTIMS[1], rate=rate)
    reports = [*(c.before for c in rigs[0].commits[1:]), rigs[0].settled.report]
    assert [r.loss_sum for r in reports] == [
        r.loss_sum for r in [*(c.before for c in rigs[2].commits[1:]), rigs[2].settled.report]
    ]
    total = rigs[0].commits[-1].tokens + rigs[0].settled.tokens
    assert sum(report.loss_tokens for report in reports) == total
    taken = [rig.taken for rig in rigs]
    assert total == sum(len(own_examples(g, t)[0]) for g in range(3) for t in range(taken[g]))


@pytest.mark.parametrize("exchange", EVERY, ids=repr)
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3)])
def test_another_world_size_goes_on_from_the_anchor(exchange: Any, old: int, new: int) -> None:
    begun = train(exchange, old, 9, optim=OPTIMS[1], rate=rate, stop_at=5, settle=False, acts=True)
    rigs = train(exchange, new, 9, optim=OPTIMS[1], rate=rate, states=[rig.state for rig in begun])
    assert [c.step for c in rigs[0].commits] == [6, 7, 8, 9]
    assert rigs[0].commits[0].tokens > begun[0].commits[-1].tokens
    assert all(torch.equal(rig.final, rigs[0].final) for rig in rigs)
    if not isinstance(exchange, LocalSGD):  # whose `kept` is the mean
        assert all(torch.equal(rig.begun, begun[0].kept[-1]) for rig in rigs)


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


# ------------------------------------------------------------------ bounds and bad numbers
class Point(nn.Module):
    """f = |w|² / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))


def growth(exchange: Any, rounds: int) -> float:
    cost = lambda model, x, t: (model.w - 0 * t).square().sum() / 2  # noqa: E731
    optim = SGD(lr=1.0, momentum=0.0, clip=0.0)  # q = 1: a round ends at the optimum of the local objective
    try:
        rigs = train(exchange, 1, rounds, optim=optim, model=Point, cost=cost, acts=True)
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


@pytest.mark.parametrize("exchange", EVERY, ids=repr)
def test_a_bad_number_in_one_group_ends_the_run_on_every_rank_alike(exchange: Any) -> None:
    seen: list[tuple[int, list[int]]] = []

    def cost(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        value = loss(model, x, t)
        bad = any(torch.equal(x, own[: len(x)]) for own in [own_examples(1, 3)[0]])
        return value * float("nan") if bad else value

    with pytest.raises(NotFinite) as error:
        train(exchange, 2, 30, optim=OPTIMS[1], cost=cost)
    assert error.value.again and error.value.rounds in ([3], []) and not seen
    for acts in (False, True):
        assert all(rig.bad for rig in train(exchange, 2, 30, optim=OPTIMS[1], cost=cost, acts=acts, catch=True))


# ------------------------------------------------------------------ uneven steps
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
    found = train(exchange, 2, 100, optim=optim, model=Point, cost=cost, data=data)[0].final[0].item()
    q = [1 - (1 - eta) ** count for count in (2, 30)]
    assert found == pytest.approx(rest([q[0] / 2, q[1] / 30]), abs=1e-8)
    optimum, plain = rest([1.0, 1.0]), rest(q)
    assert abs(found - optimum) < 0.05 < 0.3 < abs(plain - optimum)


def test_the_next_round_is_as_long_as_the_last_one_was_fast() -> None:
    """Steps over seconds of compute, of the slowest rank of each group; the fastest makes all."""
    pace = Steps(DiLoCo(local_steps=8, by_speed=True), SimpleNamespace(count=3, base=0))  # type: ignore[arg-type]
    pace.planned = [8, 4, 8]
    pace.next_round([0.5, 1.0, 0.9, 1.0, 4.0, 2.0])
    assert pace.planned == [8, 4, 2]
    pace.next_round([0.0] * 6)
    assert pace.planned == [8, 4, 2], "nothing is known of a round without compute"


@pytest.mark.parametrize(
    ("speeds", "steps"),
    [
        ([4.0, 1.0], [16, 4]),
        ([4.03, 1.0], [16, 4]),  # 3.97 of its steps: the fast one waits for the rest of the fourth
        ([5.3, 1.0], [16, 3]),  # 3.02
        ([4.5, 1.0], [16, 3]),  # 3.56: waiting for a fourth would cost the fast one two steps
        ([4.03, 1.0, 1.0, 1.0], [16, 4, 4, 4]),
        ([100.0, 1.0], [16, 1]),
        ([2.0, 2.0], [16, 16]),
    ],
)
def test_rounds_by_speed_make_the_most_steps_a_second(speeds: list[float], steps: list[int]) -> None:
    assert steps_by_speed(speeds, 16) == steps


def test_the_pace_goes_by_the_steps_that_were_made() -> None:
    """In the warm-up of one step a round, and where a slow group makes one a pulse. Seen to catch: by those planned."""
    group: Any = SimpleNamespace(count=2, base=0)
    pace = Steps(LocalSGD(local_steps=16, pulses=4, by_speed=True), group, warmup_tokens=100)
    for _ in range(3):
        pace.next_round([1.0, 4.0])
        assert pace.planned == [16, 4]
    group.base = 100
    pace.next_round([16.0, 4 * 16.0])
    assert pace.planned == [16, 1]
    pace.next_round([16.0, 16.0])
    assert pace.planned == [16, 4], "four steps were made, one a pulse"


# ------------------------------------------------------------------ asks
@pytest.mark.parametrize(
    "exchange", [*EVERY, DiLoCo(local_steps=4, pulses=4, inner="allreduce", group=2)], ids=repr
)  # fmt: skip
def test_an_ask_of_one_rank_is_heard_once_by_all_at_the_second_mark_at_the_latest(exchange: Any) -> None:
    """Also where the run was left in between. Seen to catch: asks heard inside a group that no pulse passes on, or no
    checkpoint."""
    size, rank = (4, 3) if exchange.inner != "none" else (3, 1)
    for at in (1, 2, 4, 10):  # the last: after a part of the model was sent, before it is joined and saved
        rigs = train(exchange, size, 7, optim=OPTIMS[1], rate=rate, ask=(rank, at))
        heard = [[c.step for c in rig.commits if c.asks.save] for rig in rigs]
        assert all(each == heard[0] for each in heard) and len(heard[0]) == 1
        asked = rigs[rank].asked
        assert asked is not None and heard[0][0] - 1 - asked <= 1
        begun = train(exchange, size, 7, optim=OPTIMS[1], rate=rate, ask=(rank, at), stop_at=2, settle=False)
        if begun[rank].unheard:
            continue
        again = train(exchange, size, 7, optim=OPTIMS[1], rate=rate, states=[rig.state for rig in begun])
        found = [c.step for c in [*begun[0].commits, *again[0].commits] if c.asks.save]
        assert found == heard[0] or begun[rank].asked is None
