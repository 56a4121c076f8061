"""What every exchange promises (Exchange in hvdllm/exchange/base.py). The exchanges come from the registry, so that a
new one is tested by being registered."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rig
import torch
from checks import OPTIMS, PLAIN, rate, slope
from rig import NOMINAL, train
from torch import nn
from variants import EVERY, ROUNDS, SHORTEST, facts, short, size

from hvdllm import registry
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Milestones
from hvdllm.exchange.parts import Exchange
from hvdllm.exchange.wire import parts as wires
from hvdllm.optim import parts as optims
from hvdllm.trainer import assemble

STEPS = 7
ADAMW = OPTIMS[0]
every = pytest.mark.parametrize("exchange", EVERY.values(), ids=list(EVERY))
shortest = pytest.mark.parametrize("exchange", SHORTEST.values(), ids=list(SHORTEST))
rounds = pytest.mark.parametrize("exchange", ROUNDS.values(), ids=list(ROUNDS))


def said(commits: list[Any]) -> list[Any]:
    return [(c.before.loss_sum, c.before.loss_tokens, c.before.grad_norm) for c in commits if c.before]


# ------------------------------------------------------------------ what is trained
def near(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A loss that can be learnt from any example."""
    return (model(x) - x[:, :3]).square().sum() / 2


@shortest
def test_it_learns(exchange: Exchange) -> None:
    out = train(exchange, size(exchange), 30, optim=optims.AdamW(lr=0.03, clip=0.0), cost=near)
    reports = [*(c.before for c in out[0].commits[1:]), out[0].settled.report]
    first, *_, last = [report.loss_sum / report.loss_tokens for report in reports if report.loss_tokens]
    assert last < 0.8 * first
    assert all(torch.equal(each.final, out[0].final) for each in out), "in the end all ranks have the same weights"


@every
def test_tokens_are_exact_and_losses_add_up(exchange: Exchange) -> None:
    """Every example that was computed is committed once, and in one report; all ranks are told the same."""
    out = train(exchange, size(exchange) + (not exchange.groups), 6, optim=ADAMW, rate=rate)
    told = [[*(c.before for c in each.commits[1:]), each.settled.report] for each in out]
    for each, reports in zip(out, told, strict=True):
        assert [r.loss_sum for r in reports] == [r.loss_sum for r in told[0]]
        assert [c.tokens for c in each.commits] == [c.tokens for c in out[0].commits]
        assert torch.equal(each.final, out[0].final)
    committed, settled = out[0].commits[-1].tokens, out[0].settled
    # What is on its way at the end is committed without a report, but for local steps, which meet once more.
    assert sum(report.loss_tokens for report in told[0]) == committed + settled.tokens * facts(exchange).local
    assert committed + settled.tokens + settled.dropped == sum(each.fed for each in out)


# ------------------------------------------------------------------ going on
@every
def test_acts_change_nothing_and_a_resumed_run_is_bit_equal(exchange: Exchange) -> None:
    """Seen to catch: the wrong buffer saved as flying, S~ lost on load, a checkpoint of the estimate; an outer momentum
    that is not in the checkpoint, deltas from an anchor that has moved; a round, the clients' places, or what clients
    of a round had made, not in the checkpoint."""
    n = size(exchange)
    stops = {n: (1, 2, 3, 5)} | ({} if exchange.groups else {n - 1: (4,), n + 1: (3,)})
    for n in stops:
        whole = train(exchange, n, STEPS, optim=ADAMW, rate=rate)
        for stop in stops[n]:
            begun = train(exchange, n, STEPS, optim=ADAMW, rate=rate, stop_at=stop, acts=True, settle=False)
            states = [each.state for each in begun]
            again = train(exchange, n, STEPS, optim=ADAMW, rate=rate, states=states, acts=stop == 2)
            for a, b, c in zip(whole, begun, again, strict=True):
                if facts(exchange).carries != registry.LETTERS:  # where a server has the weights, a rank has older ones
                    assert all(torch.equal(x, y) for x, y in zip(a.weights, [*b.weights, *c.weights], strict=True))
                assert torch.equal(a.final, c.final)
                assert [x.tokens for x in a.commits] == [x.tokens for x in (*b.commits, *c.commits)]
                assert said(a.commits) == said([*b.commits, *c.commits])
                assert a.settled.tokens == c.settled.tokens
                assert a.settled.report.loss_sum == c.settled.report.loss_sum


@shortest
@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4), (2, 1)])
def test_a_checkpoint_goes_on_at_any_world_size(exchange: Exchange, old: int, new: int) -> None:
    """As if nothing had been where the exchange says so (`resized` is empty); else from the weights that were kept."""
    begun = train(exchange, old, STEPS, optim=ADAMW, rate=rate, stop_at=3, settle=False, acts=True)
    again = train(exchange, new, STEPS, optim=ADAMW, rate=rate, states=[each.state for each in begun])
    assert again[0].commits[0].tokens > begun[0].commits[-1].tokens
    assert all(torch.equal(each.final, again[0].final) for each in again)
    if facts(exchange).identical:
        whole = train(exchange, 1, STEPS, optim=ADAMW, rate=rate)
        for a, b in zip(whole[0].weights[3:], again[0].weights, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ------------------------------------------------------------------ what is said
@rounds
def test_a_commit_is_reported_with_its_own_losses(exchange: Any) -> None:
    """Those of exactly the examples that it was made of, at the weights that they were computed at. Seen to catch: what
    was said booked for the wrong round."""
    (alone,) = train(exchange, 1, STEPS, optim=ADAMW)
    rigs = train(exchange, 3, STEPS, optim=ADAMW)
    reports = [[*(c.before for c in rig.commits[1:]), rig.settled.report] for rig in (alone, *rigs)]
    assert alone.commits[0].before is None and all(r.loss_tokens == NOMINAL for each in reports for r in each)
    for one, *others in zip(*reports, strict=True):
        for other in others:
            assert other.loss_sum == pytest.approx(one.loss_sum, rel=1e-12)
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-12)
    assert len({report.loss_sum for report in reports[0]}) == STEPS


SYNCHRONOUS = {name: settings for name, settings in ROUNDS.items() if settings.gradients == 1}
EXACT = pytest.mark.parametrize("exchange", SYNCHRONOUS.values(), ids=list(SYNCHRONOUS))
WHOLE = {name: settings for name, settings in ROUNDS.items() if facts(settings).sums_per_update == 1}
ONE_POINT = pytest.mark.parametrize("exchange", WHOLE.values(), ids=list(WHOLE))


def test_a_rough_wire_has_no_noise_scale_and_an_exact_one_has() -> None:
    """Squares are of gradients as they are, the norm of what arrives: of a likeness it would be another thing's."""
    for wire, known in ((wires.Fp32(), True), (wires.TopK(density=0.1, warmup_tokens=0), False)):
        out = train(exchanges.AllReduce(), 2, 8, optim=PLAIN, wire=wire)
        said = [commit.before.noise_scale for commit in out[0].commits if commit.before]
        assert any(value is not None for value in said) == known, wire


@ONE_POINT
def test_the_noise_scale_goes_on_after_a_resume(exchange: Any) -> None:
    whole = train(exchange, 2, 9, optim=PLAIN)[0]
    states = [out.state for out in train(exchange, 2, 9, optim=PLAIN, stop_at=4, settle=False)]
    on = train(exchange, 2, 9, optim=PLAIN, states=states)[0]
    expected = [commit.before.noise_scale for commit in whole.commits[4:]]
    assert [commit.before.noise_scale for commit in on.commits] == expected and any(expected)


@EXACT
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_words_of_all_ranks_that_were_are_in_the_next_report(exchange: Any, n: int) -> None:
    """The loss of the last round before a stop is said by the meta of the first one after it."""
    whole = train(exchange, 3, 6, optim=PLAIN)[0]
    states = [out.state for out in train(exchange, 3, 6, optim=PLAIN, stop_at=4, settle=False)]
    on = train(exchange, n, 6, optim=PLAIN, states=states)[0]
    first, expected = on.commits[0].before, whole.commits[4].before
    assert first.loss_tokens == expected.loss_tokens == NOMINAL
    assert first.loss_sum == pytest.approx(expected.loss_sum, rel=1e-12)


@ONE_POINT
def test_a_norm_that_overflows_stops_all_ranks(exchange: Any) -> None:
    """Every gradient is a number and so is the loss; only the sum of their squares is infinite."""
    out = train(exchange, 2, 4, optim=PLAIN, cost=lambda model, x, t: 1e300 * slope(model, x, t), catch=True)
    assert [each.bad is not None and each.bad.norm for each in out] == [math.inf] * 2


@every
def test_the_rate_of_a_commit_is_that_of_its_tokens(exchange: Any) -> None:
    """A pulse that has landed is older than the last local step, whose rate is another."""
    out = train(exchange, size(exchange), 9, optim=PLAIN, rate=lambda tokens: 1 / (1 + tokens))
    for commit in out[0].commits:
        assert commit.lr == pytest.approx(PLAIN.lr / (1 + commit.tokens), rel=1e-12)


# ------------------------------------------------------------------ bad numbers and asks
@every
def test_a_bad_number_that_one_rank_sees_ends_the_run_on_every_rank_alike(exchange: Exchange) -> None:
    for acts in (False, True):
        out = train(
            exchange, size(exchange) + (not exchange.groups), 30, optim=ADAMW, bad=(1, 5), acts=acts, catch=True
        )
        (step,) = {each.bad.step if each.bad is not None else None for each in out}
        assert step is not None and step < 12, "soon, and at the same mark"
        assert any(each.bad.again for each in out if each.bad), "somebody can deal the batch again, to find the tensor"


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("fedavg-")])
def test_an_ask_of_one_rank_is_heard_once_by_all_at_the_second_mark_at_the_latest(name: str) -> None:
    """Also where the run was left in between. Seen to catch: asks heard inside a group that no pulse passes on, or no
    checkpoint."""
    exchange = EVERY[name]
    n, rank = (4, 3) if exchange.groups else (size(exchange) + 1, 1)
    for at in (1, 2, 4, 6):  # 4: after a part of the model was sent, before it is joined and saved
        out = train(exchange, n, STEPS, optim=ADAMW, rate=rate, ask=(rank, at))
        heard = [[k for k, c in enumerate(each.commits) if c.asks.save] for each in out]
        assert all(each == heard[0] for each in heard) and len(heard[0]) == 1
        asked = out[rank].asked
        assert asked is not None and heard[0][0] - asked <= 1
        begun = train(exchange, n, STEPS, optim=ADAMW, rate=rate, ask=(rank, at), stop_at=2, settle=False)
        if begun[rank].unheard:
            continue
        again = train(exchange, n, STEPS, optim=ADAMW, rate=rate, states=[each.state for each in begun])
        found = [k for k, c in enumerate([*begun[0].commits, *again[0].commits]) if c.asks.save]
        assert found == heard[0] or begun[rank].asked is None


# ------------------------------------------------------------------ facts
def carry(do: Any, counts: dict[str, int], x: torch.Tensor, key: str) -> Any:
    counts[key] = counts.get(key, 0) + 1
    return do(x, key)


def counted(wire: Any) -> tuple[dict[str, int], dict[str, int]]:
    """From here on, how often the wire has carried each whole bucket, and slices of each."""
    found: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for name, counts in zip(("sum", "scatter"), found, strict=True):
        setattr(wire, name, partial(carry, getattr(wire, name), counts))
    return found


def facts_hold(exchange: Exchange) -> None:
    """What the registry says of an exchange is what it does."""
    claimed, attached, counts = facts(exchange), list[Any](), list[Any]()

    def joined(config: Any, *args: Any) -> Any:
        attached.append(assemble.assemble(config, *args))
        counts.append(counted(attached[-1].wire))
        return attached[-1]

    n = size(exchange)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig, "assemble", joined)
        out = train(exchange, n, STEPS, optim=ADAMW, rate=rate, settle=False)
    sums, slices = ([count for both in counts for count in both[k].values()] for k in (0, 1))
    assert bool(slices) == (claimed.carries == registry.PIECES), "slices of sums are asked for"
    assert bool(sums) == (claimed.carries == registry.SUMS), "whole sums are asked for"
    if not claimed.local:  # a round more is on its way where sums are late
        made_sums = {count // STEPS for count in (*sums, *slices)}
        assert made_sums <= {claimed.sums_per_update}, "sums of an update"
    same = [all(torch.equal(a, b) for a, b in zip(each.weights, out[0].weights, strict=True)) for each in out]
    assert all(same) or not claimed.identical, "replicas differ"
    assert not (all(same) and claimed.local), "ranks that train on their own differ in between"
    if claimed.identical:
        moments = sum(v.numel() for parts in attached for v in parts.update.state()[1].values())
        whole = len(attached[0].flat.x) * len(attached[0].update.state()[1])
        assert moments == whole * (1 if claimed.shares_state else n), "of the optimizer's state each rank holds a share"


@shortest
def test_facts_are_what_the_exchange_does(exchange: Exchange) -> None:
    facts_hold(exchange)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("allreduce", {"carries": registry.PIECES}), ("allreduce", {"local": True}),
        ("sharded", {"shares_state": False}), ("acco", {"sums_per_update": 1}), ("acco", {"carries": registry.SUMS}),
        ("diloco", {"identical": True}), ("parameter_server", {"carries": registry.SUMS}),
    ],
    ids=str,
)  # fmt: skip
def test_a_part_that_is_registered_wrongly_is_noticed(
    name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = registry.parts("exchange")[name]
    lie = dataclasses.replace(part, facts=dataclasses.replace(part.facts, **wrong))
    monkeypatch.setitem(registry._parts["exchange"], name, lie)
    with pytest.raises(AssertionError):
        facts_hold(SHORTEST[name])


def test_an_exchange_of_ones_own_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of hvdllm/README.md."""
    (text,) = re.findall(r"```python\n(.*?)```", (Path(registry.__file__).parent / "README.md").read_text(), re.S)[:1]
    (tmp_path / "example_exchange.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry._parts, "exchange", dict(registry.parts("exchange")))
    known = set(registry.parts("exchange"))
    registry.load("example_exchange")
    monkeypatch.delitem(sys.modules, "example_exchange")
    (name,) = set(registry.parts("exchange")) - known
    exchange = short(registry.parts("exchange")[name])
    for promise in (
        test_it_learns, test_tokens_are_exact_and_losses_add_up, test_facts_are_what_the_exchange_does,
        test_acts_change_nothing_and_a_resumed_run_is_bit_equal,
        test_a_bad_number_that_one_rank_sees_ends_the_run_on_every_rank_alike,
    ):  # fmt: skip
        promise(exchange)


@pytest.mark.parametrize("part", registry.parts("exchange").values(), ids=lambda part: part.name)
def test_every_exchange_takes_what_a_run_tells_it(part: registry.Part) -> None:
    exchange, wanted, told = registry.built(part)(part.settings(), 24), Milestones((8,), (4,), 100), []
    exchange.milestones, exchange.unlike = wanted, True
    exchange.watch = lambda *interval: told.append(interval)
    exchange.watch(1, "compute", None, None)
    assert (exchange.milestones, exchange.unlike, len(told)) == (wanted, True, 1)
    assert exchange.marks_on_ask == (part.name == "parameter_server")


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        (exchanges.AllReduce(), 1), (exchanges.Acco(), 1), (exchanges.ParameterServer(), 1),
        (exchanges.LocalSGD(local_steps=16), 16), (exchanges.DiLoCo(local_steps=50, pulses=1), 50),
        (exchanges.DiLoCo(local_steps=50, pulses=5), 13), (exchanges.FedAvg(local_steps=20, pulses=3), 10),
        (exchanges.StreamingDiLoCo(local_steps=50, fragments=4), 13),
    ],
    ids=repr,
)  # fmt: skip
def test_a_period_is_the_batches_from_one_mark_to_the_next(settings: Any, batches: int) -> None:
    assert settings.batches_a_commit == batches


SGD_CLIPPED = optims.SGD(lr=0.02, momentum=0.9, clip=0.1)
UNLIKE = {
    "allreduce": exchanges.AllReduce(),
    "delayed": exchanges.Delayed(warmup_tokens=0),
    "local_sgd": exchanges.LocalSGD(local_steps=2, inner="allreduce", group=2),
}


@pytest.fixture
def rounds_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch.linalg.vector_norm

    def by_rank(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        odd = threading.current_thread().name.endswith("rank-1")
        return norm(x, *args, **kwargs) * (1 + 1e-9 * odd)

    monkeypatch.setattr(torch.linalg, "vector_norm", by_rank)


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("told", [True, False])
def test_one_ranks_norm_clips_for_all(name: str, told: bool, rounds_differently: None) -> None:
    first, second = train(UNLIKE[name], 2, 6, optim=SGD_CLIPPED, unlike=told)
    assert first.final.equal(second.final) is told, "without it they drift apart"
