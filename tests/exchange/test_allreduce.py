"""exchange=allreduce: one process with the whole batch, whatever the number of ranks; Adasum; who waits."""

from __future__ import annotations

from typing import Any

import clock_kit
import pytest
import rig
import torch
from checks import NAMES, OPTIMS, equals_one_process, stable_below
from clock_kit import BYTES, slowed, sums
from rig import MICRO, NOMINAL, Plain, deal, examples, loss, net

from hvdllm.exchange.parts import AllReduce
from hvdllm.flat import Flat
from hvdllm.optim.parts import SGD
from hvdllm.world.hub import Links


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("optim", OPTIMS, ids=NAMES)
def test_it_equals_one_process(optim: Any, size: int) -> None:
    """Seen to catch: a gradient buffer that is not zeroed, a sum divided by the rank's own tokens, hooks that are armed
    for every micro-batch."""
    equals_one_process(AllReduce(), optim, size)


@pytest.mark.parametrize(("bound", "momentum"), [(2.0, 0.0), (3.8, 0.9)])
def test_stable_below_the_bound_and_not_above(bound: float, momentum: float) -> None:
    stable_below(AllReduce(), bound, momentum)


def adasum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a @ b
    return (1 - d / (2 * (a @ a))) * a + (1 - d / (2 * (b @ b))) * b


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adasum_takes_token_means_tensor_by_tensor_and_divides_by_nothing(size: int) -> None:
    optim = SGD(lr=0.05, momentum=0.9, clip=0.4)
    plain = Plain(optim)
    for t in range(4):
        model = net()
        cuts = [p.numel() for p in model.parameters()]
        means = []
        for rank in range(size):
            with torch.no_grad():
                for p, piece in zip(model.parameters(), plain.x.split(cuts), strict=True):
                    p.copy_(piece.view(p.shape))
            model.zero_grad()
            x, y = (each[deal(t, 1, rank, size)] for each in examples(t, 1))
            loss(model, x, y).backward()
            means.append([p.grad.reshape(-1) / len(x) for p in model.parameters()])  # type: ignore[union-attr]
        while len(means) > 1:
            means = [
                [adasum(a, b) for a, b in zip(means[k], means[k + 1], strict=True)] for k in range(0, len(means), 2)
            ]
        expected = plain.step(torch.cat(means[0]), 1)
    assert MICRO < NOMINAL // 4
    rigs = rig.train(AllReduce(reduction="adasum"), size, 4, optim=optim)
    torch.testing.assert_close(rigs[-1].weights[-1], expected, rtol=0, atol=1e-11)


def test_under_all_reduce_all_wait_for_it() -> None:
    out = clock_kit.train(4, 12, AllReduce(), slowed(2, 40.0))
    blocked, compute = sums(out[0], "blocked_s"), sums(out[0], "compute_s")
    assert blocked[2] < 0.01 * compute[2], "nobody is slower"
    for rank in (0, 1, 3):
        assert blocked[rank] + compute[rank] == pytest.approx(compute[2], rel=0.02)


def test_seconds_of_a_step_are_those_that_one_can_reckon() -> None:
    """Two ranks of one example a second; the sum's bytes over the link, and meta's, one after the other."""
    out = clock_kit.train(2, 6, AllReduce(), lambda rank: 1.0, links=Links(2 * BYTES))
    whole = clock_kit.train(1, 6, AllReduce(), lambda rank: 1.0)
    assert sums(whole[0], "compute_s") == [24.0 * 5] and sums(whole[0], "blocked_s") == [0.0]
    compute, blocked = sums(out[0], "compute_s"), sums(out[0], "blocked_s")
    assert sum(compute) == pytest.approx(24.0 * 5, rel=1e-6), "ragged shares of 24 examples a step"
    apart = sum(abs(a - b) for c in out[0].commits if c.before for a, b in [c.before.compute_s])
    # The padded buckets, blocked on both; and whoever had less to compute waits for the other.
    padded = Flat(rig.net(), 2, 1).g.nbytes
    assert sum(blocked) == pytest.approx(5 * 2 * padded / (2 * BYTES) + apart, rel=1e-3)
