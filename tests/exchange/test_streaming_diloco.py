"""exchange=streaming_diloco against its rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import rig
import torch
from checks import PLAIN, steady
from local_kit import OPTIMS, rate
from rig import Plain, net, train
from rig import own_gradient as gradient

from hvdllm.exchange.parts import DiLoCo, StreamingDiLoCo


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


STREAMING = StreamingDiLoCo(local_steps=6, fragments=4, delay=1, outer_lr=0.5, outer_momentum=0.5)


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
