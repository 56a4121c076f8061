"""exchange=acco against its two halves, and timed halves under a simulated clock."""

from __future__ import annotations

from typing import Any

import clock_kit
import pytest
import rig
import torch
from checks import NAMES, OPTIMS, PLAIN, equal, rate, stable_below
from clock_kit import BYTES, slowed, sums
from rig import NOMINAL, Plain, train

from hvdllm.exchange.parts import Acco
from hvdllm.world.hub import Links

TIMED = Acco(timed=True)
STEPS = 7


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


def test_a_timed_half_has_its_share_and_no_more_micro_batches_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast network would end a half at once: a rank's share of half a batch counts all the same, here three
    micro-batches. A slow one would never: `most` ends it."""
    lane = rig.Examples.lane
    monkeypatch.setattr(rig.Examples, "lane", lambda self, index, of, most: lane(self, index, of, most // 3))
    out = train(Acco(timed=True), 2, 8, optim=PLAIN, links=Links(1e9), speeds=lambda rank: 10.0)[0]
    made = [b.tokens - a.tokens for a, b in zip(out.commits, out.commits[1:], strict=False)]
    assert made == [NOMINAL] * 7, "not a micro-batch more, since nothing travels long, and not one less"
    slow = Acco(timed=True, most=5)
    out = train(slow, 2, 8, optim=PLAIN, links=Links(200.0), speeds=lambda rank: 100.0)[0]
    said = [report.micro_batches for report in (commit.before for commit in out.commits) if report]
    assert [2 * slow.most] * 2 in said[1:] and max(max(each) for each in said) == 2 * slow.most


def test_under_timed_acco_a_rank_of_a_quarter_the_speed_does_a_quarter_of_the_micro_batches() -> None:
    """And nobody waits. Caught: halves that end for all alike, a speed that is not used."""
    out = clock_kit.train(4, 30, TIMED, slowed(2), links=Links(BYTES, 0.01))
    done, blocked, compute = (sums(out[0], name) for name in ("micro_batches", "blocked_s", "compute_s"))
    others = [done[rank] for rank in (0, 1, 3)]
    assert max(others) - min(others) <= 2 and done[2] / others[0] == pytest.approx(0.25, rel=0.1)
    assert sum(blocked) < 0.01 * sum(compute) and max(compute) < 1.1 * min(compute)
    assert all(a.final.equal(out[0].final) for a in out), "the replicas agree all the same"
    tokens = [3 * count for count in done]  # of a micro-batch: a rank's share of half a batch
    assert sum(tokens) == sum(c.before.loss_tokens for c in out[0].commits if c.before)


def test_stable_below_the_bound_and_not_above() -> None:
    stable_below(Acco(), 2.0)
