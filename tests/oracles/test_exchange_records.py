"""What exchanges say and keep beside the weights: flight time, the noise scale, words of ranks that are gone, tokens by
which a rate is looked up, local steps that were masked or not yet met."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import rig
import torch
from rig import NOMINAL, train
from torch import nn

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.wire import parts as wires
from hvdllm.optim import parts as optims
from hvdllm.world.hub import Links

PLAIN = optims.SGD(lr=0.02, momentum=0.0, weight_decay=0.0, clip=0.0)
ADAM = optims.AdamW(lr=0.01)


# ------------------------------------------------------------------ the noise scale
def test_a_rough_wire_has_no_noise_scale_and_an_exact_one_has() -> None:
    """Squares are of gradients as they are, the norm of what arrives: of a likeness it would be another thing's."""
    for wire, known in ((wires.Fp32(), True), (wires.TopK(density=0.1, warmup_tokens=0), False)):
        out = train(exchanges.AllReduce(), 2, 8, optim=PLAIN, wire=wire)
        said = [commit.before.noise_scale for commit in out[0].commits if commit.before]
        assert any(value is not None for value in said) == known, wire


@pytest.mark.parametrize("exchange", [exchanges.AllReduce(), exchanges.Sharded(), exchanges.Delayed(warmup_tokens=0)])
def test_the_noise_scale_goes_on_after_a_resume(exchange: Any) -> None:
    whole = train(exchange, 2, 9, optim=PLAIN)[0]
    states = [out.state for out in train(exchange, 2, 9, optim=PLAIN, stop_at=4, settle=False)]
    on = train(exchange, 2, 9, optim=PLAIN, states=states)[0]
    expected = [commit.before.noise_scale for commit in whole.commits[4:]]
    assert [commit.before.noise_scale for commit in on.commits] == expected and any(expected)


# ------------------------------------------------------------------ seconds
@pytest.mark.parametrize("exchange", [exchanges.Delayed(warmup_tokens=0), exchanges.Acco()], ids=["delayed", "acco"])
def test_flights_that_overlap_are_booked_once(exchange: Any) -> None:
    """On a link far slower than compute something is always travelling: a second of flight a second, and no more,
    although each round is launched before the one before has landed."""
    out = train(exchange, 2, 12, optim=PLAIN, links=Links(400.0), speeds=lambda rank: 100.0)[0]
    reports = [commit.before for commit in out.commits if commit.before][3:]
    for report in reports:
        for rank in range(2):
            passed = report.compute_s[rank] + report.blocked_s[rank]
            assert 0.8 * passed < report.flight_s[rank] <= 1.0001 * passed


# ------------------------------------------------------------------ another world size
@pytest.mark.parametrize("exchange", [exchanges.AllReduce(), exchanges.Sharded()], ids=["allreduce", "sharded"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_words_of_all_ranks_that_were_are_in_the_next_report(exchange: Any, size: int) -> None:
    """The loss of the last round before a stop is said by the meta of the first one after it."""
    whole = train(exchange, 3, 6, optim=PLAIN)[0]
    states = [out.state for out in train(exchange, 3, 6, optim=PLAIN, stop_at=4, settle=False)]
    on = train(exchange, size, 6, optim=PLAIN, states=states)[0]
    first, expected = on.commits[0].before, whole.commits[4].before
    assert first.loss_tokens == expected.loss_tokens == NOMINAL
    assert first.loss_sum == pytest.approx(expected.loss_sum, rel=1e-12)


# ------------------------------------------------------------------ delay compensation
@pytest.mark.parametrize("compensation", [0.0, 3.0])
def test_a_resumed_delay_is_compensated_from_the_weights_that_its_gradients_were_taken_at(compensation: float) -> None:
    exchange = exchanges.Delayed(warmup_tokens=0, compensation=compensation)
    whole = train(exchange, 2, 9, optim=ADAM)[0]
    states = [out.state for out in train(exchange, 2, 9, optim=ADAM, stop_at=4, settle=False)]
    on = train(exchange, 2, 9, optim=ADAM, states=states)[0]
    for got, expected in zip(on.weights, whole.weights[4:], strict=True):
        assert torch.equal(got, expected)


# ------------------------------------------------------------------ timed halves
def test_a_timed_half_has_its_share_and_no_more_micro_batches_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast network would end a half at once: a rank's share of half a batch counts all the same, here three
    micro-batches. A slow one would never: `most` ends it."""
    lane = rig.Lanes.lane
    monkeypatch.setattr(rig.Lanes, "lane", lambda self, index, of, most: lane(self, index, of, most // 3))
    out = train(exchanges.Acco(timed=True), 2, 8, optim=PLAIN, links=Links(1e9), speeds=lambda rank: 10.0)[0]
    made = [b.tokens - a.tokens for a, b in zip(out.commits, out.commits[1:], strict=False)]
    assert made == [NOMINAL] * 7, "not a micro-batch more, since nothing travels long, and not one less"
    slow = exchanges.Acco(timed=True, most=5)
    out = train(slow, 2, 8, optim=PLAIN, links=Links(200.0), speeds=lambda rank: 100.0)[0]
    said = [report.micro_batches for report in (commit.before for commit in out.commits) if report]
    assert [2 * slow.most] * 2 in said[1:] and max(max(each) for each in said) == 2 * slow.most


# ------------------------------------------------------------------ local steps
def steady(count: int = 4) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """The same number of examples in every step of every group."""
    return lambda group, step: (torch.ones(count, 4).double(), torch.ones(count, 3).double())


def slope(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Gradient 1 an example for every weight, whatever the weights are."""
    return sum((p.sum() for p in model.parameters()), torch.zeros(()).double()) * len(x)


@pytest.mark.parametrize("exchange", [
    exchanges.LocalSGD(local_steps=4, pulses=4),
    exchanges.DiLoCo(local_steps=4, pulses=4, outer_lr=1.0, outer_momentum=0.0),
    exchanges.DiLoCo(local_steps=4, pulses=4, outer_lr=1.0, outer_momentum=0.0, overlap=True),
    exchanges.StreamingDiLoCo(local_steps=6, fragments=3, delay=0, outer_lr=1.0, outer_momentum=0.0, mixing=0.0),
], ids=["local_sgd", "diloco", "overlap", "streaming"])  # fmt: skip
@pytest.mark.parametrize("steps", [5, 6, 7, 9])
def test_each_local_step_counts_once_wherever_a_run_ends(exchange: Any, steps: int) -> None:
    """With a gradient of 1 everywhere and the mean of deltas applied as it is, every weight has moved by rate times the
    local steps that were made, the unfinished round's among them."""
    out = train(exchange, 2, steps, optim=PLAIN, model=rig.net, cost=slope, data=steady())
    for each in out:
        moved = (each.begun - each.final) / PLAIN.lr
        torch.testing.assert_close(moved, torch.full_like(moved, float(each.taken)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exchange", [
    exchanges.LocalSGD(local_steps=4, pulses=4), exchanges.DiLoCo(local_steps=4, pulses=4),
    exchanges.StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
], ids=["local_sgd", "diloco", "streaming"])  # fmt: skip
def test_the_norm_that_is_reported_is_that_of_one_group_and_not_of_all_together(exchange: Any) -> None:
    """Every group's gradient is 1 in each of P places, so sqrt(P) is the root mean square over any number of them."""
    out = train(exchange, 3, 7, optim=PLAIN, cost=slope, data=steady())
    norms = [commit.before.grad_norm for commit in out[0].commits if commit.before]
    assert norms == pytest.approx([math.sqrt(out[0].begun.numel())] * len(norms)) and norms


STREAMING = exchanges.StreamingDiLoCo(local_steps=6, fragments=4, delay=1, outer_lr=0.5, outer_momentum=0.5)


@pytest.mark.parametrize("stop_at", [None, 2, 4, 6])
def test_a_streaming_run_looks_its_rate_up_at_the_tokens_there_are(
    stop_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of equal steps: at local step s everybody has trained on 2 x 4 x s examples, although what is said of them
    arrives later, part by part; and the same where the run was stopped with a part in the air."""
    stepped = rig.steps_noted(monkeypatch)

    def run(**more: Any) -> Any:
        return train(STREAMING, 2, 8, optim=PLAIN, data=steady(), settle=False, **more)

    states, begun = None, 0
    if stop_at is not None:
        states = [out.state for out in run(stop_at=stop_at)]
        assert states[0][0].shared["air"] is not None
        begun = states[0][1][1]
        stepped.clear()
    taken = run(states=states)[0].taken
    assert sorted(set(stepped)) == [8 * s for s in range(begun + 1, taken + 1)]


@pytest.mark.parametrize("exchange", [
    exchanges.LocalSGD(local_steps=6, pulses=3), exchanges.DiLoCo(local_steps=6, pulses=3),
    exchanges.DiLoCo(local_steps=6, pulses=3, overlap=True),
    exchanges.StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
], ids=["local_sgd", "diloco", "overlap", "streaming"])  # fmt: skip
def test_a_masked_local_step_stops_all_ranks_at_the_next_mark(exchange: Any) -> None:
    """Only its group sees it, and nobody saves or evaluates meanwhile: the pulse says it."""

    def data(group: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, t = rig.own_examples(group, step)
        return (x * math.inf, t) if (group, step) == (1, 7) else (x, t)

    out = train(exchange, 3, 40, optim=PLAIN, data=data, catch=True)
    assert all(each.bad is not None for each in out)
    (step,) = {each.bad.step for each in out if each.bad is not None}
    assert step < 12, "soon, not at the end"


@pytest.mark.parametrize(
    "exchange", [exchanges.AllReduce(), exchanges.Sharded(), exchanges.Delayed(warmup_tokens=0)], ids=str
)
def test_a_norm_that_overflows_stops_all_ranks(exchange: Any) -> None:
    """Every gradient is a number and so is the loss; only the sum of their squares is infinite."""
    out = train(exchange, 2, 4, optim=PLAIN, cost=lambda model, x, t: 1e300 * slope(model, x, t), catch=True)
    assert [each.bad is not None and each.bad.norm for each in out] == [math.inf] * 2


@pytest.mark.parametrize("exchange", [
    exchanges.AllReduce(), exchanges.Delayed(warmup_tokens=0), exchanges.Acco(),
    exchanges.LocalSGD(local_steps=6, pulses=3),
    exchanges.DiLoCo(local_steps=6, pulses=3), exchanges.DiLoCo(local_steps=6, pulses=3, overlap=True),
    exchanges.StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
], ids=["allreduce", "delayed", "acco", "local_sgd", "diloco", "overlap", "streaming"])  # fmt: skip
def test_the_rate_of_a_commit_is_that_of_its_tokens(exchange: Any) -> None:
    """A pulse that has landed is older than the last local step, whose rate is another."""
    out = train(exchange, 2, 9, optim=PLAIN, rate=lambda tokens: 1 / (1 + tokens))
    for commit in out[0].commits:
        assert commit.lr == pytest.approx(PLAIN.lr / (1 + commit.tokens), rel=1e-12)
