"""Each exchange against its recursion in a few plain lines, on 1 to 4 virtual ranks: other data on each rank, ragged
counts, accumulation, clipping under norms that change, and every optimizer (Adam's first step hides every wrong scale).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import NOMINAL, Plain, train
from torch import nn

from hvdllm.exchange.base import NotFinite
from hvdllm.exchange.parts import Acco, AllReduce, Delayed, Sharded
from hvdllm.optim.parts import SGD, AdamW, NAdam

STEPS = 7
OPTIMS = [
    AdamW(lr=0.02, clip=1.0, weight_decay=0.3),
    AdamW(lr=0.02, clip=0.0),
    SGD(lr=0.05, momentum=0.9, clip=0.4, weight_decay=0.1),
    SGD(lr=0.02, momentum=0.8, nesterov=True, clip=0.0),
    NAdam(lr=0.01, clip=0.8),
]
NAMES = ["adamw", "adamw-unclipped", "sgd", "nesterov", "nadam"]


def rate(tokens: int) -> float:
    """Changes from update to update."""
    return 1.0 / (1.0 + tokens / 100)


def equal(rigs: list[Any], expected: list[torch.Tensor]) -> None:
    for rig in rigs:
        assert len(rig.weights) == len(expected)
        for t, (a, b) in enumerate(zip(rig.weights, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda m, t=t: f"commit {t + 1}: {m}")
        assert all(torch.equal(a, b) for a, b in zip(rig.weights, rigs[0].weights, strict=True)), "replicas differ"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("optim", OPTIMS, ids=NAMES)
@pytest.mark.parametrize("exchange", [AllReduce(), Sharded()], ids=["allreduce", "sharded"])
def test_exact_ones_equal_one_process(exchange: Any, optim: Any, size: int) -> None:
    """Seen to catch: a gradient buffer that is not zeroed, a sum divided by the rank's own tokens, hooks that are armed
    for every micro-batch, weights that are not handed out, a norm of a rank's own pieces."""
    plain, expected = Plain(optim, rate), []
    for t in range(STEPS):
        expected.append(plain.step(plain.gradient(plain.x, t), NOMINAL))
    rigs = train(exchange, size, STEPS, optim=optim, rate=rate)
    equal(rigs, expected)
    assert [c.tokens for c in rigs[0].commits] == [NOMINAL * (t + 1) for t in range(STEPS)]
    assert rigs[0].settled.tokens == 0 and torch.equal(rigs[0].final, rigs[0].weights[-1])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("optim", OPTIMS, ids=NAMES)
@pytest.mark.parametrize("warmup", [0, 2])
def test_delayed_equals_its_recursion(optim: Any, size: int, warmup: int) -> None:
    """x_{t+1} = step(x_t, G_{t-1}), after `warmup` synchronous updates and one that is left out.

    Seen to catch: no flip of the buffers, one not zeroed, another round's tokens, no warm-up. (A sum that is landed as
    soon as it is launched changes no number: the lab's hidden share shows it.)
    """
    plain, expected = Plain(optim, rate), []
    for t in range(warmup):
        expected.append(plain.step(plain.gradient(plain.x, t), NOMINAL))
    flying = plain.gradient(plain.x, warmup)
    for t in range(warmup + 1, STEPS + 1):
        fresh = plain.gradient(plain.x, t)
        expected.append(plain.step(flying, NOMINAL))
        flying = fresh
    rigs = train(Delayed(warmup_tokens=warmup * NOMINAL), size, STEPS, optim=optim, rate=rate)
    equal(rigs, expected)
    assert [c.staleness for c in rigs[0].commits] == [0.0] * warmup + [1.0] * (STEPS - warmup)
    assert rigs[0].settled.tokens == NOMINAL, "what flies is committed in the end"
    torch.testing.assert_close(rigs[-1].final, plain.step(flying, NOMINAL), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_compensation_follows_its_rule(size: int) -> None:
    """Seen to catch: weights of the gradient that are never moved on, a wrong sign."""
    optim, lam = SGD(lr=0.05, momentum=0.9, clip=0.0), 0.7
    plain, expected = Plain(optim, rate), []
    then = plain.x
    flying = plain.gradient(then, 0)
    for t in range(1, STEPS + 1):
        now = plain.x
        fresh = plain.gradient(now, t)
        expected.append(plain.step(flying + lam * flying * flying * (now - then), NOMINAL))
        flying, then = fresh, now
    equal(train(Delayed(warmup_tokens=0, compensation=lam), size, STEPS, optim=optim, rate=rate), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("optim", OPTIMS, ids=NAMES)
def test_acco_equals_its_two_halves(optim: Any, size: int) -> None:
    """Seen to catch: a step in place of the peek, S~ or n~ left out, no tentative weights, a buffer not zeroed, an S~
    that is a view of it, the rate of a peek without n~."""
    plain, expected = Plain(optim, rate), []
    half = NOMINAL // 2
    kept = plain.gradient(plain.x, 0, 2)  # tentative half, at x~_0 = x_0
    for t in range(STEPS):
        fresh = plain.gradient(plain.x, 2 * t + 1, 2)
        estimate = plain.peek(kept, half)
        expected.append(plain.step(kept + fresh, NOMINAL))
        kept = plain.gradient(estimate, 2 * t + 2, 2)
    rigs = train(Acco(), size, STEPS, optim=optim, rate=rate)
    equal(rigs, expected)
    assert [c.tokens for c in rigs[0].commits] == [NOMINAL * (t + 1) for t in range(STEPS)]
    assert rigs[0].settled.tokens == half
    torch.testing.assert_close(rigs[-1].final, plain.step(kept, half), rtol=0, atol=1e-11)


@pytest.mark.parametrize("exchange", [AllReduce(), Sharded(), Delayed(warmup_tokens=NOMINAL), Acco()], ids=type)
def test_acts_change_nothing_and_a_resumed_run_is_bit_equal(exchange: Any) -> None:
    """Seen to catch: the wrong buffer saved as flying, S~ lost on load, a checkpoint of the estimate."""
    for size in (2, 3):
        whole = train(exchange, size, STEPS, optim=OPTIMS[0], rate=rate)
        acting = train(exchange, size, STEPS, optim=OPTIMS[0], rate=rate, acts=True)
        for stop in (1, 3):
            begun = train(exchange, size, STEPS, optim=OPTIMS[0], rate=rate, stop_at=stop)
            states = [rig.state for rig in begun]
            again = train(exchange, size, STEPS, optim=OPTIMS[0], rate=rate, states=states)
            for a, b, c in zip(whole, again, acting, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a.weights[stop:], b.weights, strict=True))
                assert all(torch.equal(x, y) for x, y in zip(a.weights, c.weights, strict=True))
                assert torch.equal(a.final, b.final) and torch.equal(a.final, c.final)
                said = [(r.before.loss_sum, r.before.loss_tokens, r.before.grad_norm) for r in a.commits[stop:]]
                assert said == [(r.before.loss_sum, r.before.loss_tokens, r.before.grad_norm) for r in b.commits]
                assert a.settled == b.settled or a.settled.report.loss_sum == b.settled.report.loss_sum


@pytest.mark.parametrize("exchange", [Sharded(), Delayed(warmup_tokens=NOMINAL), Acco()], ids=type)
@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4), (2, 1)])
def test_a_checkpoint_goes_on_at_any_world_size(exchange: Any, old: int, new: int) -> None:
    whole = train(exchange, 1, STEPS, optim=OPTIMS[0], rate=rate)
    states = [rig.state for rig in train(exchange, old, STEPS, optim=OPTIMS[0], rate=rate, stop_at=3, settle=False)]
    again = train(exchange, new, STEPS, optim=OPTIMS[0], rate=rate, states=states)
    for a, b in zip(whole[0].weights[3:], again[0].weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("exchange", [AllReduce(), Sharded(), Delayed(warmup_tokens=0), Acco()], ids=type)
def test_a_commit_is_reported_with_its_own_losses(exchange: Any) -> None:
    """Those of exactly the examples that it was made of, at the weights that they were computed at. Seen to catch: what
    was said booked for the wrong round."""
    (alone,) = train(exchange, 1, STEPS, optim=OPTIMS[0])
    rigs = train(exchange, 3, STEPS, optim=OPTIMS[0])
    reports = [[*(c.before for c in rig.commits[1:]), rig.settled.report] for rig in (alone, *rigs)]
    assert alone.commits[0].before is None and all(r.loss_tokens == NOMINAL for each in reports for r in each)
    for one, *others in zip(*reports, strict=True):
        for other in others:
            assert other.loss_sum == pytest.approx(one.loss_sum, rel=1e-12)
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-12)
    assert len({report.loss_sum for report in reports[0]}) == STEPS


# ------------------------------------------------------------------ stability
class Point(nn.Module):
    """f = sum over examples |w - t|² / 2: curvature 1 of the mean loss; the minimum moves with the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))


def quadratic(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (model.w - t).square().sum() / 2


def growth(exchange: Any, lr: float, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Largest weight in the last quarter of 600 updates over that in the second quarter."""
    optim = SGD(lr=lr, momentum=momentum, nesterov=nesterov, clip=0.0)
    try:
        (rig,) = train(exchange, 1, 400, optim=optim, model=Point, cost=quadratic)
    except NotFinite:
        return float("inf")
    sizes = [w.abs().max().item() for w in rig.weights]
    return max(sizes[300:]) / max(sizes[100:200])


LATE = Delayed(warmup_tokens=0)


@pytest.mark.parametrize(
    ("exchange", "bound", "momentum"),
    [
        (AllReduce(), 2.0, 0.0),
        (Sharded(), 2.0, 0.0),
        (Acco(), 2.0, 0.0),
        (LATE, 1.0, 0.0),
        (AllReduce(), 3.8, 0.9),
        (LATE, 0.1, 0.9),
        (LATE, 0.5, 0.5),
    ],
    ids=str,
)
def test_stable_below_the_bound_and_not_above(exchange: Any, bound: float, momentum: float) -> None:
    """An exchange that is not late, or later than it says, has another bound; data differ from half to half, else
    ACCO's second mode is never seen."""
    assert growth(exchange, 0.9 * bound, momentum) < 1.7 < 5 < growth(exchange, 1.2 * bound, momentum)


def test_nesterov_for_delay_stands_a_larger_rate() -> None:
    """Bound 2.53 in rate / (1 - momentum) at momentum .9 (2505.01099), where plain descent stands 1 and momentum .1."""
    assert growth(LATE, 0.23, 0.9, nesterov=True) < 1.7 < 5 < growth(LATE, 0.29, 0.9, nesterov=True)
    assert growth(LATE, 0.23, 0.9) > 5


def test_delayed_adamw_circles_and_does_not_diverge() -> None:
    for lr in (0.01, 0.1):
        optim = AdamW(lr=lr, clip=0.0, weight_decay=0.0)
        cost = lambda model, x, t: (model.w - 0 * t).square().sum() / 2  # noqa: E731
        rigs = train(Delayed(warmup_tokens=0), 1, 900, optim=optim, model=Point, cost=cost)
        amplitude = max(w.abs().max().item() for w in rigs[0].weights[-60:])
        assert 0.8 * lr < amplitude < 2.0 * lr
