"""Schedules, and optimizers on slices, against a few lines of NumPy."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvdllm import registry
from hvdllm.flat import Span
from hvdllm.optim import by_hand
from hvdllm.optim.parts import SGD, Adam, AdamW, Constant, Cosine, NAdam, WarmupStableDecay
from hvdllm.optim.schedule import factor
from hvdllm.optim.update import Update

N, DECAYED, TOKENS = 96, 64, 10.0
SETTINGS = [
    AdamW(lr=0.01, clip=1.0),
    AdamW(lr=0.01, clip=0.0, weight_decay=0.3),
    AdamW(lr=0.01, clip=1.0, freeze_tokens=3),
    NAdam(lr=0.01, clip=1.0),
    SGD(lr=0.01, momentum=0.0, clip=1.0),
    SGD(lr=0.01, momentum=0.9, weight_decay=0.1, clip=0.0),
    SGD(lr=0.01, momentum=0.9, nesterov=True, clip=2.0),
]
# Every registered optimizer is held to what all of them promise, by being registered.
EVERY = [*SETTINGS, *(kind(lr=0.01, clip=1.0) for kind in registry.kinds("optim").values())]


def gradients(steps: int = 7) -> list[np.ndarray]:
    """Sums over TOKENS tokens whose means have norms from 0.1 to 100: one step of Adam would not see a scale."""
    draw = np.random.default_rng(0)
    norms = np.geomspace(0.1, 100, steps)[draw.permutation(steps)]
    raw = draw.standard_normal((steps, N))
    return [TOKENS * norm * g / np.linalg.norm(g) for norm, g in zip(norms, raw, strict=True)]


def ours(
    settings: Adam | SGD, cuts: list[int], dtype: torch.dtype, grads: list[np.ndarray]
) -> tuple[torch.Tensor, Update]:
    """x after these steps, cut into pieces at `cuts`."""
    borders = sorted({0, DECAYED, N, *cuts})
    spans = [Span(a, b, b <= DECAYED) for a, b in itertools.pairwise(borders)]
    x = torch.linspace(-1, 1, N, dtype=dtype)
    update = Update(settings, lambda tokens: 1 / tokens)
    update.attach(SimpleNamespace(x=x), spans)
    for k, g in enumerate(grads, 1):
        pieces = [torch.tensor(g, dtype=dtype)[a:b].contiguous() for a, b, _ in spans]
        lr, norm = update.step(
            [x[a:b] for a, b, _ in spans], pieces, SimpleNamespace(tokens=TOKENS, committed=k), lambda v: v
        )
        assert lr == pytest.approx(0.01 / k)
        if np.isfinite(g).all():
            assert norm.read()[0] == pytest.approx(np.linalg.norm(g) / TOKENS, rel=1e-5)
    return x, update


@pytest.mark.parametrize("settings", [SETTINGS[2], SETTINGS[3]], ids=repr)
def test_by_hand_nothing_is_made_that_is_as_long_as_a_slice(settings: Adam, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = ours(settings, [], torch.float32, gradients())
    made, where = [], torch.where

    def seen(*args: torch.Tensor) -> torch.Tensor:
        made.append(where(*args))
        return made[-1]

    monkeypatch.setattr(by_hand, "CHUNK", 16)
    monkeypatch.setattr(torch, "where", seen)
    assert ours(settings, [], torch.float32, gradients())[0].equal(whole), "bit for bit"
    assert {len(x) for x in made} == {16}


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[5]], ids=repr)
def test_a_share_of_a_step_is_a_step_at_that_share_of_the_rate(settings: Adam | SGD) -> None:
    """Decay and momentum included; the rate that is told is the whole one."""

    def steps(lr: float, share: float) -> torch.Tensor:
        x = torch.linspace(-1, 1, N, dtype=torch.float64)
        update = Update(type(settings)(**{**vars(settings), "lr": lr}), lambda tokens: 1.0)
        update.attach(SimpleNamespace(x=x), [Span(0, N, True)])
        for g in gradients(3):
            meta = SimpleNamespace(tokens=TOKENS, committed=1)
            assert update.step([x], [torch.tensor(g)], meta, lambda v: v, share)[0] == lr
        return x

    torch.testing.assert_close(steps(0.08, 0.25), steps(0.02, 1.0), rtol=0, atol=1e-12)


def oracle(settings: Adam | SGD, grads: list[np.ndarray]) -> np.ndarray:
    x, m, v = np.linspace(-1, 1, N), np.zeros(N), np.zeros(N)
    wd = settings.weight_decay * (np.arange(N) < DECAYED)
    for t, total in enumerate(grads, 1):
        g, lr = total / TOKENS, settings.lr / t
        if settings.clip:
            g = g * min(1.0, settings.clip / np.linalg.norm(g))
        if isinstance(settings, Adam):
            b1, b2 = settings.beta1, settings.beta2
            m = b1 * m + (1 - b1) * g
            if t <= (getattr(settings, "freeze_tokens", None) or np.inf):  # a step commits one token here
                v, seen = b2 * v + (1 - b2) * g * g, t
            ahead = m / (1 - b1**t)
            if isinstance(settings, NAdam):
                ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            x = x - lr * wd * x - lr * ahead / (np.sqrt(v / (1 - b2**seen)) + settings.eps)
        else:
            g = g + wd * x
            m = settings.momentum * m + g
            x = x - lr * (g + settings.momentum * m if settings.nesterov else m)
    return x


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_numpy(settings: Adam | SGD) -> None:
    grads = gradients()
    np.testing.assert_allclose(ours(settings, [], torch.float64, grads)[0].numpy(), oracle(settings, grads), atol=1e-12)
    np.testing.assert_allclose(ours(settings, [], torch.float32, grads)[0].numpy(), oracle(settings, grads), atol=1e-5)


def test_a_frozen_second_moment_keeps_its_bias_correction() -> None:
    """Gradients of equal size: every step stays one rate long, however long v has been frozen and whatever beta2 is.
    With a correction that went on the steps after 3 of 500 would be 12 times as long."""
    settings = AdamW(lr=0.01, beta2=0.999, clip=0.0, weight_decay=0.0, freeze_tokens=3)
    x = torch.zeros(N, dtype=torch.float64)
    update = Update(settings, lambda tokens: 1.0)
    update.attach(SimpleNamespace(x=x), [Span(0, N, False)])
    for k in range(1, 501):
        before = x.clone()
        meta = SimpleNamespace(tokens=1.0, committed=k)
        update.step([x], [torch.ones(N, dtype=torch.float64)], meta, lambda v: v)
        torch.testing.assert_close(before - x, torch.full_like(x, 0.01), rtol=1e-5, atol=0)
    assert update.frozen_at == 3 and update.state()[0]["frozen_at"] == 3


def test_a_frozen_second_moment_goes_on_frozen_after_a_resume() -> None:
    settings, grads = AdamW(lr=0.01, clip=1.0, freeze_tokens=3), gradients()
    x, update = ours(settings, [], torch.float64, grads[:5])
    whole, _ = ours(settings, [], torch.float64, grads[:6])
    again = Update(settings, lambda tokens: 1 / tokens)
    spans = [Span(0, DECAYED, True), Span(DECAYED, N, False)]
    again.attach(SimpleNamespace(x=x), spans)
    again.load(*update.state())
    pieces = [torch.tensor(grads[5])[a:b].contiguous() for a, b, _ in spans]
    again.step([x[a:b] for a, b, _ in spans], pieces, SimpleNamespace(tokens=TOKENS, committed=6), lambda v: v)
    assert torch.equal(x, whole)


@pytest.mark.parametrize("settings", EVERY)
def test_cut_into_other_pieces_the_optimizer_is_bit_equal(settings: Adam | SGD) -> None:
    """With clipping off: the norm's own sum is allowed another rounding."""
    settings = type(settings)(**{**vars(settings), "clip": 0.0})
    assert torch.equal(
        ours(settings, [], torch.float32, gradients())[0], ours(settings, [16, 48, 80], torch.float32, gradients())[0]
    )


@pytest.mark.parametrize("settings", EVERY)
def test_a_gradient_that_is_not_finite_changes_nothing_and_nothing_after_it_does(settings: Adam | SGD) -> None:
    grads = gradients()
    bad = grads[3].copy()
    bad[70] = np.inf
    x, update = ours(settings, [], torch.float32, [*grads[:3], bad, *grads[4:]])
    expected, before = ours(settings, [], torch.float32, grads[:3])
    assert torch.equal(x, expected)
    assert all(torch.equal(update.vectors[name], before.vectors[name]) for name in before.vectors)


@pytest.mark.parametrize("settings", EVERY)
def test_a_peek_is_the_step_to_come_and_touches_nothing(settings: Adam | SGD) -> None:
    grads = gradients()
    x, update = ours(settings, [], torch.float64, grads[:3])
    spans = [Span(0, DECAYED, True), Span(DECAYED, N, False)]
    kept = [torch.tensor(grads[3])[a:b].clone() for a, b, _ in spans]
    before = x.clone(), {k: v.clone() for k, v in update.vectors.items()}, [g.clone() for g in kept]
    meta = SimpleNamespace(tokens=TOKENS, committed=4)
    pieces = [x[a:b] for a, b, _ in spans]
    seen = torch.cat(update.peek(pieces, kept, meta, lambda v: v))
    assert torch.equal(x, before[0]) and all(torch.equal(v, before[1][k]) for k, v in update.vectors.items())
    assert all(torch.equal(a, b) for a, b in zip(kept, before[2], strict=True)) and update.steps == 3
    bad = [g * float("inf") for g in kept]
    assert torch.equal(torch.cat(update.peek(pieces, bad, meta, lambda v: v)), x) and not update.bad
    update.step(pieces, kept, meta, lambda v: v)
    assert torch.equal(x, seen) and not torch.equal(x, before[0])


@pytest.mark.parametrize("settings", EVERY)
def test_state_goes_on_bit_equal(settings: Adam | SGD) -> None:
    grads = gradients()
    whole, _ = ours(settings, [], torch.float32, grads)
    x, update = ours(settings, [], torch.float32, grads[:3])
    again = Update(settings, lambda tokens: 1 / tokens)
    spans = [Span(0, DECAYED, True), Span(DECAYED, N, False)]
    again.attach(SimpleNamespace(x=x), spans)
    again.load(*update.state())
    for k, g in enumerate(grads[3:], 4):
        pieces = [torch.tensor(g, dtype=torch.float32)[a:b].contiguous() for a, b, _ in spans]
        again.step([x[a:b] for a, b, _ in spans], pieces, SimpleNamespace(tokens=TOKENS, committed=k), lambda v: v)
    assert torch.equal(x, whole)


@pytest.mark.parametrize("name", registry.kinds("optim"))
def test_facts_are_what_the_optimizer_does(name: str) -> None:
    """How many numbers it keeps for each weight, whether a step is linear in the gradient, and what it can freeze."""
    part = registry.parts("optim")[name]
    bare = {"lr": 0.01, "clip": 0.0, "weight_decay": 0.0}
    start = torch.linspace(-1, 1, N, dtype=torch.float64)
    grads = gradients()
    (once, update), (twice, _) = (
        ours(part.settings(**bare), [], torch.float64, [scale * g for g in grads]) for scale in (1, 2)
    )
    assert sum(len(vector) for vector in update.state()[1].values()) == part.facts.vectors * N
    assert torch.allclose(twice - start, 2 * (once - start), rtol=1e-9, atol=0) == part.facts.linear
    assert part.facts.freezes == hasattr(part.settings, "freeze_tokens") and not (
        part.facts.linear and part.facts.second_moments
    )
    if part.facts.freezes:
        frozen, never = (ours(part.settings(**bare, freeze_tokens=t), [], torch.float64, grads)[0] for t in (3, 99))
        assert torch.equal(never, once) and not torch.equal(frozen, once)


def test_schedules() -> None:
    constant = factor(Constant(warmup=0.1), 1000)
    assert [constant(t) for t in (50, 100, 5000)] == [0.5, 1.0, 1.0]
    cosine = factor(Cosine(warmup=0.1, floor=0.2), 1000)
    assert [cosine(t) for t in (1, 100, 550, 1000, 2000)] == pytest.approx([0.01, 1.0, 0.6, 0.2, 0.2])
    stable = factor(WarmupStableDecay(warmup=0.1, decay=0.2, floor=0.1), 1000)
    assert [stable(t) for t in (100, 800, 900, 1000, 3000)] == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    for settings in (WarmupStableDecay(warmup=0.0, decay=0.2, floor=0.0), Cosine(warmup=0.0, floor=0.0)):
        rates = [factor(settings, 1000, 50)(t) for t in range(50, 1001, 50)]
        assert all(rate > 0 for rate in rates) and rates[-1] < 0.25, "no update is given away"
        assert factor(settings, 1000, 50)(1050) == pytest.approx(0)
    falls = [factor(WarmupStableDecay(warmup=0.0, decay=0.2, floor=0.0), 1000, 50)(t) for t in (800, 850, 900, 1000)]
    assert falls == pytest.approx([1.0, 0.8, 0.6, 0.2]), "five equal steps for four updates"
    assert factor(Cosine(warmup=0.0), 1000)(1) == pytest.approx(1.0, abs=1e-4)
