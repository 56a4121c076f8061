"""Parameter servers against plain references, on virtual ranks with other data, ragged counts and own times."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import server_rig
import torch
from rig import Plain, loss, net, own_examples
from server_rig import NOMINAL, asks_heard, pushes, serve
from torch import nn

from hvdllm.exchange.base import Milestones, NotFinite
from hvdllm.exchange.parts import ParameterServer as Settings
from hvdllm.exchange.server_shard import ServedSlice
from hvdllm.flat import Flat
from hvdllm.optim.parts import SGD, AdamW
from hvdllm.optim.update import Update
from hvdllm.world import virtual

OPTIMS = [
    SGD(lr=0.02, momentum=0.9, clip=0.5, weight_decay=0.1), AdamW(lr=0.01, clip=0.5, weight_decay=0.1),
]  # fmt: skip
PLAIN = SGD(lr=0.05, momentum=0.0, clip=0.0)


def rate(tokens: int) -> float:
    return 1.0 / (1 + tokens / 200)


def uneven(rank: int, number: int) -> int:
    """Simulated seconds; the last of three ranks is slow."""
    return 7 + 3 * rank + 40 * (rank == 2) + number % 3


def far(sender: int, to: int) -> int:
    """Simulated seconds of a letter: some servers are a long way from some workers."""
    return 1 + 60 * ((sender + 2 * to) % 3)


def gradient(x: torch.Tensor, worker: int, numbers: list[int]) -> tuple[torch.Tensor, int, float]:
    """Sum over the micro-batches of one push at these weights, its examples and its loss."""
    model, count, value = net(), 0, 0.0
    with torch.no_grad():
        for p, piece in zip(model.parameters(), x.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(piece.view(p.shape))
    for number in numbers:
        inputs, targets = own_examples(worker, number)
        each = loss(model, inputs, targets)
        each.backward()
        count, value = count + len(inputs), value + each.item()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]), count, value  # type: ignore[union-attr]


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(worker, tau, theta) after each push that server 0 of a run has applied."""
    found: list[Any] = []
    push = ServedSlice._push

    def pushing(self: ServedSlice, letter: Any) -> None:
        late = self.version - self._seen[letter.sender].version
        push(self, letter)
        if self.rank == self.servers[0]:
            found.append((letter.sender, late, self.theta.clone()))

    monkeypatch.setattr(ServedSlice, "_push", pushing)
    return found


# ------------------------------------------------------------------ staleness 0
@pytest.mark.parametrize("optim", OPTIMS, ids=type)
@pytest.mark.parametrize(("size", "servers"), [(1, 0), (2, 0), (3, 0), (3, 1), (4, 2), (5, 0)])
def test_staleness_0_is_one_process_with_the_whole_batch(optim: Any, size: int, servers: int) -> None:
    """Ragged pushes, clipping at work, a slow worker, letters that are long on their way. Seen to catch: a step for
    each push, a pull before the clock's step, squares of one server's piece alone, a push left out of the sum."""
    workers, marks = size - servers, 5
    plain, lanes = Plain(optim, rate), [pushes(i, size - servers) for i in range(size - servers)]
    expected, losses = [], []
    for _ in range(marks):
        parts = [gradient(plain.x, i, next(lane)) for i, lane in enumerate(lanes)]
        expected.append(plain.step(sum(g for g, _, _ in parts), sum(n for _, n, _ in parts)))
        losses.append(sum(value for _, _, value in parts))
    settings = Settings(staleness=0, servers=servers)
    rigs = serve(settings, size, plain.tokens, optim=optim, rate=rate, act=1, acts=True, pace=uneven, transit=far)
    for rig in rigs:
        assert [c.step for c in rig.commits] == [1, 2, 3, 4, 5] and rig.commits[-1].tokens == plain.tokens
        for k in range(marks):
            torch.testing.assert_close(rig.kept[k], expected[k], rtol=0, atol=1e-11)
        torch.testing.assert_close(rig.final, expected[-1], rtol=0, atol=1e-11)
        reports = [*(c.before for c in rig.commits[1:]), rig.settled.report]
        assert [r.loss_sum for r in reports] == pytest.approx(losses)
        assert all(c.staleness == 0 and c.updates == 1 for c in rig.commits)
        assert len(rig.settled.report.compute_s) == size and rig.settled.dropped == 0
    assert sum(rig.taken for rig in rigs[workers:]) == 0
    # Without acts, which would wait for every push anyway.
    bare = serve(settings, size, plain.tokens, optim=optim, rate=rate, log=0, pace=uneven, transit=far)
    torch.testing.assert_close(bare[0].final, expected[-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("servers", [0, 1])
def test_at_staleness_0_acts_change_no_bit(servers: int) -> None:
    """Frozen marks, light ones, asks in mid-clock."""
    settings = Settings(staleness=0, servers=servers)
    bare = serve(settings, 3, 200, optim=OPTIMS[1], rate=rate, pace=uneven, log=0)
    acting = serve(settings, 3, 200, optim=OPTIMS[1], rate=rate, pace=lambda r, k: 50 - 9 * r, act=40, acts=True)
    asked = serve(settings, 3, 200, optim=OPTIMS[1], rate=rate, pace=uneven, asks={(0, 3): "save", (1, 9): "save"})
    assert len(acting[0].kept) > 4 and len(asks_heard(asked)) == 2
    for other in (acting, asked):
        for a, b in zip(bare, other, strict=True):
            assert torch.equal(a.final, b.final) and a.commits[-1].tokens == b.commits[-1].tokens


@pytest.mark.parametrize("optim", OPTIMS, ids=type)
@pytest.mark.parametrize(("size", "servers"), [(2, 0), (3, 0), (3, 1), (4, 2)])
def test_at_staleness_0_a_resumed_run_is_bit_equal(optim: Any, size: int, servers: int) -> None:
    """From marks where everybody waits, and from asked ones, where some have a gradient without a ticket."""
    settings, how = Settings(staleness=0, servers=servers), {"optim": optim, "rate": rate, "pace": uneven, "act": 30}
    whole = serve(settings, size, 150, **how)
    for stop, asks in ((1, None), (3, None), (2, {(0, 3): "save"}), (3, {(1, 4): "save"})):
        begun = serve(settings, size, 150, **how, asks=asks, stop_at=stop)
        if begun[0].state is None:  # a light one
            continue
        again = serve(settings, size, 150, **how, states=[rig.state for rig in begun])
        for a, b in zip(whole, again, strict=True):
            assert torch.equal(a.final, b.final)
            assert a.commits[-1].tokens == b.commits[-1].tokens
            assert a.settled.report.loss_sum == b.settled.report.loss_sum


# ------------------------------------------------------------------ bounded and asynchronous
class Point(nn.Module):
    """f = h·w² / 2 for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))


H = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)


def bowl(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return len(x) * (H * model.w.square()).sum() / 2  # type: ignore[operator]


def two(worker: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 1), torch.zeros(2, 1)


def in_turn(workers: int) -> Any:
    """The first micro-batch of each takes longer, so that they push one after the other, far enough apart."""
    return lambda rank, number: 100 * (rank + 1) if number == 0 else 100 * workers


def round_robin(a: float, workers: int, settings: Settings, steps: int, trail: list[Any]) -> list[torch.Tensor]:
    """theta after each push, where `a` is the rate of a push."""
    trail.clear()
    size = workers + settings.dedicated
    optim = SGD(lr=a * workers, momentum=0.0, clip=0.0, weight_decay=0.0)
    rigs = serve(
        settings, size, 2 * steps, optim=optim, nominal=2 * workers, pace=in_turn(workers), model=Point, cost=bowl,
        data=two, log=0,
    )  # fmt: skip
    assert sum(commit.updates for commit in rigs[0].commits) == rigs[0].commits[-1].tokens / 2, "one a push"
    assert [worker for worker, _, _ in trail[:steps]] == [k % workers for k in range(steps)], "they take turns"
    return [theta[:3] for _, _, theta in trail[:steps]]


def delayed(a: float, d: int, steps: int, eta: Any = lambda late: 1.0) -> list[torch.Tensor]:
    xs = [torch.ones(3, dtype=torch.float64)]
    for t in range(steps):
        late = min(t, d)
        xs.append(xs[-1] - a * eta(late) * H * xs[t - late])
    return xs[1:]


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_in_turn_are_delayed_descent_stable_on_one_side_of_its_bound(workers: int, trail: list[Any]) -> None:
    """d = W - 1. Seen to catch: a full rate for every push."""
    settings = Settings(servers=1)
    ours = round_robin(0.2, workers, settings, 40, trail)
    for a, b in zip(ours, delayed(0.2, workers - 1, 40), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    bound = 2 * math.sin(math.pi / (2 * (2 * workers - 1)))
    below = round_robin(0.9 * bound, workers, settings, 160, trail)
    above = round_robin(1.1 * bound, workers, settings, 160, trail)
    assert max(abs(x[0]) for x in below[-10:]) < 0.3 and max(abs(x[0]) for x in above[-10:]) > 5


@pytest.mark.parametrize("workers", [2, 3])
def test_delay_compensation_with_the_true_hessian_takes_the_delay_away(
    workers: int, trail: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole trajectory is that of undelayed descent. Seen to catch: the sign, the backup of another worker, one
    global backup."""

    def curvature(self: ServedSlice, gradient: torch.Tensor, tokens: int) -> torch.Tensor:
        out = torch.zeros_like(gradient)
        out[:3] = tokens * H
        return out

    monkeypatch.setattr(ServedSlice, "_curvature", curvature)
    ours = round_robin(0.3, workers, Settings(servers=1, compensation=1.0), 40, trail)
    for a, b in zip(ours, delayed(0.3, 0, 40), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_delay_compensation_as_written(trail: list[Any]) -> None:
    """G + λ G*G*(theta - theta_then), in sums over 2 examples; λ in tokens."""
    ours = round_robin(0.3, 3, Settings(servers=1, compensation=0.7), 12, trail)
    xs = [torch.ones(3, dtype=torch.float64)]
    for t in range(12):
        then = xs[t - min(t, 2)]
        total = 2 * H * then
        total = total + 0.7 * total * total * (xs[-1] - then)
        xs.append(xs[-1] - 0.3 * total / 2)
    for a, b in zip(ours, xs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_staleness_aware_rate_is_divided_by_the_staleness(trail: list[Any]) -> None:
    ours = round_robin(0.3, 4, Settings(servers=1, staleness_aware=True), 30, trail)
    for a, b in zip(ours, delayed(0.3, 3, 30, lambda late: 1 / max(1, late)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("staleness", [0, 1, 3, None])
@pytest.mark.parametrize("act", [0, 60])
def test_the_gap_reaches_the_bound_and_never_passes_it(staleness: int | None, servers: int, act: int) -> None:
    """Seen from outside, by the micro-batches begun, one a push; also right after acts. Seen to catch: a bound that is
    ignored, always 0, or one too high."""
    workers, begun, worst = 3, [0, 0, 0], [0]

    def begins(rank: int, number: int) -> None:
        begun[rank] += 1
        worst[0] = max(worst[0], max(begun) - min(begun))

    settings = Settings(staleness=staleness, servers=servers)
    pace = lambda rank, number: (20, 33, 200, 0)[rank]  # noqa: E731
    serve(settings, workers + servers, 420, optim=PLAIN, nominal=3, pace=pace, begins=begins, act=act)
    assert (worst[0] > 5) if staleness is None else (worst[0] == staleness + 1), worst


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("staleness", [1, None])
@pytest.mark.parametrize("optim", OPTIMS, ids=type)
def test_every_server_applies_the_same_pushes_in_the_order_of_tickets(
    optim: Any, servers: int, staleness: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is the same set of pushes everywhere: what several servers have made is what one makes of the same
    gradients, clipped by the norm of the whole. Seen to catch: order of arrival, the norm of a piece."""
    taken: dict[int, dict[int, Any]] = {}
    push = ServedSlice._push

    def pushing(self: ServedSlice, letter: Any) -> None:
        taken.setdefault(self.version, {})[self.rank] = (letter.sender, letter.head, letter.body.clone())
        push(self, letter)

    monkeypatch.setattr(ServedSlice, "_push", pushing)
    size = 3 + servers
    rigs = serve(
        Settings(staleness=staleness, servers=servers), size, 200, optim=optim, rate=rate, pace=uneven, act=90,
        acts=True, transit=far,
    )  # fmt: skip
    plain, order = Plain(optim, rate), [n for n, _ in net().named_parameters()]
    flat = Flat(net(), size, 1)
    for version in sorted(taken):
        here = taken[version]
        assert len({sender for sender, _, _ in here.values()}) == 1 and len(here) == (servers or size)
        whole = torch.cat([here[rank][2] for rank in sorted(here)])
        total, head = torch.cat([flat.view(n, whole).reshape(-1) for n in order]), next(iter(here.values()))[1]
        plain.tokens = head["committed"] - head["n"]
        scaled = plain.rate
        plain.rate = lambda tokens, n=head["n"]: rate(tokens) * n / NOMINAL  # type: ignore[misc]
        plain.step(total, head["n"])
        plain.rate = scaled
    torch.testing.assert_close(rigs[0].final, plain.x, rtol=0, atol=1e-11)
    assert all(torch.equal(rig.final, rigs[0].final) for rig in rigs)
    commits = rigs[0].commits
    assert max(c.staleness_max for c in commits) >= max(c.staleness for c in commits) > 0


def test_a_batch_of_pushes_is_one_full_step() -> None:
    """Of a gradient that does not depend on the weights: batch_tokens of pushes move by one rate."""

    def slope(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return len(x) * model.w.sum()  # type: ignore[operator]

    optim = SGD(lr=0.25, momentum=0.0, clip=0.0)
    rigs = serve(Settings(), 3, 90, optim=optim, model=Point, cost=slope, pace=uneven)
    tokens = rigs[0].commits[-1].tokens
    torch.testing.assert_close(rigs[0].final[0].item(), 1 - 0.25 * tokens / NOMINAL)


@pytest.mark.parametrize("servers", [0, 1])
def test_at_staleness_0_a_report_has_the_norm_of_its_own_clock(servers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last one, and those of a run that was stopped right behind a mark and goes on. Seen to catch: the norm
    of the clock before, none after a resume, a mark without a push, a step that counts marks."""
    norms: dict[int, float] = {}
    clock = ServedSlice._clock

    def noted(self: ServedSlice, letters: list[Any]) -> None:
        clock(self, letters)
        norms[self.version] = self.norm  # type: ignore[assignment]

    monkeypatch.setattr(ServedSlice, "_clock", noted)
    settings, size, clocks = Settings(staleness=0, servers=servers), 3 + servers, 8

    def reports(rig: Any) -> list[Any]:
        return [
            *(c.before for c in rig.commits if c.before is not None),
            *([rig.settled.report] if rig.settled else []),
        ]

    whole = serve(settings, size, 10**9, optim=PLAIN, asks={(1, clocks): "stop"}, log=1)[0]
    assert [r.grad_norm for r in reports(whole)] == [norms[3 * k] for k in range(len(whole.commits))]
    tokens = [c.tokens for c in whole.commits]
    assert len(set(tokens)) == len(tokens) and [c.step for c in whole.commits] == list(range(1, len(tokens) + 1))
    asks = {(0, 3): "save"}
    first = serve(settings, size, 10**9, optim=PLAIN, asks=asks, stop_at=4, log=1, act=1)
    rest = serve(settings, size, tokens[-1], optim=PLAIN, states=[rig.state for rig in first], log=1)[0]
    cut = [*reports(first[0]), *reports(rest)]
    assert [r.grad_norm for r in cut] == [r.grad_norm for r in reports(whole)]
    assert [c.step for c in (*first[0].commits, *rest.commits)] == [c.step for c in whole.commits]


# ------------------------------------------------------------------ asks, delays, other sizes, bad numbers
KINDS = [(s, k) for s in (0, 2, None) for k in (0, 1)]


@pytest.mark.parametrize(("staleness", "servers"), KINDS)
@pytest.mark.parametrize("who", [0, 1, "server"])
def test_an_ask_is_heard_by_all_at_the_second_mark_at_the_latest(staleness: Any, servers: int, who: Any) -> None:
    """Marks are rare here (none before the budget), so what is heard is heard because it was asked. A rank that only
    waits, a server's above all, sends its asks as letters."""
    settings, size = Settings(staleness=staleness, servers=servers), 3 + servers
    if who != "server":
        asks = {(who, 4): "stop"}
        rigs = serve(settings, size, 3000, optim=PLAIN, pace=uneven, log=0, asks=asks)
    else:
        if not servers:
            pytest.skip("every rank trains")
        worlds: list[Any] = []
        made = virtual.VirtualWorld.mail

        def mail(self: Any) -> Any:
            worlds.append(self)
            return made(self)

        def begins(rank: int, number: int) -> None:
            if rank == 0 and number == 4:
                server = next(world for world in worlds if world.rank == size - 1)
                server.asks.stop = server.asks.save = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(virtual.VirtualWorld, "mail", mail)
            rigs = serve(settings, size, 3000, optim=PLAIN, pace=uneven, log=0, begins=begins)
    for rig in rigs:
        assert [(c.tokens, c.step, c.asks) for c in rig.commits] == [
            (c.tokens, c.step, c.asks) for c in rigs[0].commits
        ]
        assert 1 <= len(rig.commits) <= 2 and rig.commits[-1].asks.stop and rig.commits[-1].tokens < 400
        assert torch.equal(rig.final, rigs[0].final)


@pytest.mark.parametrize(("staleness", "servers"), KINDS)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (2, 3, 4))])
def test_heavy_tailed_delays_and_asks_at_any_moment(staleness: Any, servers: int, seed: int) -> None:
    """No deadlock (virtual ranks that all wait for each other are an error), the same marks and acts on every rank,
    each ask heard once."""
    draw = random.Random(seed)
    times = {(rank, k): int(draw.paretovariate(0.8) * 5) for rank in range(4) for k in range(500)}
    asks = {(draw.randrange(3), draw.randint(1, 8)): "save" for _ in range(2)}
    wanted = Milestones((35, 50), (20,), 260)
    rigs = serve(
        Settings(staleness=staleness, servers=servers), 3 + servers, 260, optim=OPTIMS[seed % 2], rate=rate,
        milestones=wanted, acts=True, asks=asks, transit=lambda a, b: int(draw.paretovariate(0.8)),
        pace=lambda rank, k: min(times[rank, k], 10_000),
    )  # fmt: skip
    for rig in rigs:
        assert [(c.tokens, c.step) for c in rig.commits] == [(c.tokens, c.step) for c in rigs[0].commits]
        assert all(torch.equal(a, b) for a, b in zip(rig.kept, rigs[0].kept, strict=True))
        assert torch.equal(rig.final, rigs[0].final)
    crossed = [sum(c.tokens >= 35 * k for c in rigs[0].commits) for k in (1, 4)]
    assert all(crossed) and 1 <= len(asks_heard(rigs)) <= 2


@pytest.mark.parametrize(("staleness", "servers"), KINDS)
@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4), (3, 3)])
def test_it_goes_on_from_a_checkpoint_also_at_another_size(staleness: Any, servers: int, old: int, new: int) -> None:
    """At another one what had no ticket is counted as dropped."""
    settings, how = Settings(staleness=staleness, servers=servers), {"optim": OPTIMS[1], "rate": rate, "pace": uneven}
    begun = serve(settings, old, 300, **how, act=50, asks={(0, 5): "save"}, stop_at=2, log=0)
    states = [rig.state for rig in begun]
    assert all(state is not None for state in states)
    left = sum(state.mine["n"] for state, _ in states)
    rigs = serve(settings, new, 300, **how, act=50, states=states, acts=True, log=0)
    last, next_ = begun[0].commits[-1], rigs[0].commits[0]
    assert next_.tokens > last.tokens and next_.step == last.step + next_.updates
    last = rigs[0].settled
    assert all(torch.equal(rig.final, rigs[0].final) for rig in rigs)
    assert last.dropped >= left if old != new else last.dropped >= 0
    assert all(rig.settled == last for rig in rigs)


def test_a_resumed_gradient_is_as_stale_as_the_weights_it_was_taken_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow worker is asked to save while it computes, so that its gradient has no ticket yet; the others have pushed
    meanwhile. Its push, the first after the resume, is shortened by all of them."""
    settings = Settings(staleness=None, servers=1, staleness_aware=True)
    how: dict[str, Any] = {"optim": PLAIN, "pace": lambda rank, number: 45 if rank == 0 else 10, "log": 0, "act": 1000}
    begun = serve(settings, 4, 300, **how, asks={(0, 2): "save"}, stop_at=1)
    mine = [rig.state[0].mine for rig in begun]
    late = begun[0].state[0].shared["counts"]["pushes"] - mine[0]["seen"][1]
    assert mine[0]["phase"] == "push" and late > 3
    shares: list[float] = []

    class Noted(Update):
        def step(self, pieces: Any, grad: Any, meta: Any, total: Any, share: float = 1.0) -> Any:
            shares.append(share)
            return super().step(pieces, grad, meta, total, share)

    monkeypatch.setattr(server_rig, "Update", Noted)
    serve(settings, 4, 300, **how, states=[rig.state for rig in begun])
    assert shares[0] == pytest.approx(mine[0]["n"] / NOMINAL / late)


@pytest.mark.parametrize("servers", [0, 1])
def test_second_moments_that_servers_have_frozen_stay_frozen_after_a_resume(servers: int) -> None:
    settings = Settings(staleness=0, servers=servers)
    how: dict[str, Any] = {"optim": AdamW(lr=0.01, beta2=0.999, freeze_tokens=45), "pace": uneven, "act": 30}
    whole = serve(settings, 3, 240, **how)
    begun = serve(settings, 3, 240, **how, stop_at=4)
    again = serve(settings, 3, 240, **how, states=[rig.state for rig in begun])
    assert all(torch.equal(a.final, b.final) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize(("staleness", "servers"), KINDS)
def test_a_gradient_that_is_not_finite_is_never_pushed(staleness: Any, servers: int) -> None:
    """All ranks raise at the same mark; only the rank that had it has something to compute again."""

    def poisoned(worker: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, t = own_examples(worker, number)
        return (x * float("nan"), t) if (worker, number) == (1, 6) else (x, t)

    with pytest.raises(NotFinite) as error:
        serve(Settings(staleness=staleness, servers=servers), 3 + servers, 900, optim=PLAIN, data=poisoned)
    assert math.isnan(error.value.norm) and error.value.again


def test_a_sum_that_overflows_on_the_servers_stops_too() -> None:
    """Each worker's gradient is finite, their sum is not."""

    def huge(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 1e154 * len(x) * model.w.sum()  # type: ignore[operator]

    with pytest.raises(NotFinite):
        serve(Settings(staleness=0), 3, 200, optim=PLAIN, model=Point, cost=huge, nominal=3)


def test_bytes_are_a_push_and_a_pull() -> None:
    """To another rank: (servers that are not this one) / servers of P each way; a worker sends, a server answers."""
    size = sum(p.nbytes for p in net().parameters())
    rigs = serve(Settings(servers=1), 2, 100, optim=PLAIN, log=0, nominal=1)  # every micro-batch is a push
    pushes_made = rigs[0].taken
    assert pushes_made * size <= rigs[0].sent <= (pushes_made + 3) * 3 * size  # padded for two ranks, and acts
