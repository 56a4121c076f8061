"""What holds of every exchange whose ranks train on their own between meetings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import rig
import torch
from checks import PLAIN, slope, steady
from local_kit import OPTIMS, rate
from rig import Plain, loss, own_examples, train
from rig import own_gradient as gradient
from torch import nn
from variants import LOCAL, facts

from hvdllm.exchange.base import NotFinite
from hvdllm.exchange.parts import DiLoCo, LocalSGD, StreamingDiLoCo

EVERY = [settings for settings in LOCAL.values() if not facts(settings).clients]


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


@pytest.mark.parametrize("exchange", [
    LocalSGD(local_steps=4, pulses=4),
    DiLoCo(local_steps=4, pulses=4, outer_lr=1.0, outer_momentum=0.0),
    DiLoCo(local_steps=4, pulses=4, outer_lr=1.0, outer_momentum=0.0, overlap=True),
    StreamingDiLoCo(local_steps=6, fragments=3, delay=0, outer_lr=1.0, outer_momentum=0.0, mixing=0.0),
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
    LocalSGD(local_steps=4, pulses=4), DiLoCo(local_steps=4, pulses=4),
    StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
], ids=["local_sgd", "diloco", "streaming"])  # fmt: skip
def test_the_norm_that_is_reported_is_that_of_one_group_and_not_of_all_together(exchange: Any) -> None:
    """Every group's gradient is 1 in each of P places, so sqrt(P) is the root mean square over any number of them."""
    out = train(exchange, 3, 7, optim=PLAIN, cost=slope, data=steady())
    norms = [commit.before.grad_norm for commit in out[0].commits if commit.before]
    assert norms == pytest.approx([math.sqrt(out[0].begun.numel())] * len(norms)) and norms


@pytest.mark.parametrize("exchange", [
    LocalSGD(local_steps=6, pulses=3), DiLoCo(local_steps=6, pulses=3),
    DiLoCo(local_steps=6, pulses=3, overlap=True),
    StreamingDiLoCo(local_steps=6, fragments=3, delay=1),
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


@pytest.mark.parametrize("exchange", EVERY, ids=repr)
def test_a_bad_number_in_one_group_names_its_step_alone(exchange: Any) -> None:
    def cost(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        value = loss(model, x, t)
        bad = any(torch.equal(x, own[: len(x)]) for own in [own_examples(1, 3)[0]])
        return value * float("nan") if bad else value

    with pytest.raises(NotFinite) as error:
        train(exchange, 2, 30, optim=OPTIMS[1], cost=cost)
    assert error.value.again and error.value.rounds in ([3], [])
