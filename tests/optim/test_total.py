"""Slices that several ranks own: one norm, one clip, one verdict on what is not finite."""

import math
from types import SimpleNamespace

import pytest
import torch

from hvdllm import registry
from hvdllm.flat import Span
from hvdllm.optim.parts import SGD, AdamW, Constant, Cosine, Infinite, WarmupStableDecay
from hvdllm.optim.schedule import factor
from hvdllm.optim.update import Update

SETTINGS = [AdamW(lr=0.02, clip=1.0), SGD(lr=0.02, clip=1.0, weight_decay=0.1)]
SPANS = [[Span(0, 24, True), Span(24, 32, False)], [Span(32, 48, True), Span(48, 64, False)]]
NORMS = (0.1, 30.0, 1.0, 5.0, 0.05, 100.0)  # clipped or not


def gradient(t: int) -> torch.Tensor:
    g = torch.randn(64, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return 10 * NORMS[t] * g / g.norm()


def train(settings: AdamW | SGD, owners: list[list[Span]], bad: int | None = None) -> tuple[torch.Tensor, list[Update]]:
    """Each of `owners` updates its own spans of one vector; total adds what the others' squares come to."""
    x = torch.linspace(-1, 1, 64, dtype=torch.float64)
    updates = [Update(settings, lambda tokens: 1.0) for _ in owners]
    for update, spans in zip(updates, owners, strict=True):
        update.attach(SimpleNamespace(x=x), spans)
    for t in range(6):
        g = gradient(t)
        if t == bad:
            g[40] = math.nan  # on the second owner's slice
        whole = g.square().sum()
        for update, spans in zip(updates, owners, strict=True):
            pieces, own = [x[a:b] for a, b, _ in spans], [g[a:b].clone() for a, b, _ in spans]
            expected = sum(piece.square().sum() for piece in own)

            def total(squares: torch.Tensor, expected: torch.Tensor = expected) -> torch.Tensor:
                torch.testing.assert_close(squares, expected, equal_nan=True)
                return whole  # noqa: B023 - called in this step

            _, norm = update.step(pieces, own, SimpleNamespace(tokens=10.0, committed=t), total)
            assert norm.read()[0] == pytest.approx(NORMS[t], rel=1e-12) or bad is not None
    return x, updates


@pytest.mark.parametrize("settings", SETTINGS)
def test_owners_clip_by_the_norm_of_all(settings: AdamW | SGD) -> None:
    together = [[*SPANS[0], *SPANS[1]]]
    assert torch.equal(train(settings, SPANS)[0], train(settings, together)[0])


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_one_owner_sees_stops_all(settings: AdamW | SGD) -> None:
    x, updates = train(settings, SPANS, bad=0)
    assert torch.equal(x, torch.linspace(-1, 1, 64, dtype=torch.float64))
    assert all(not vector.any() for update in updates for vector in update.vectors.values())


def test_no_norm_is_clipped_to_its_bound_from_below() -> None:
    x = torch.zeros(16, dtype=torch.float64)
    update = Update(SGD(lr=1.0, momentum=0.0, clip=1.0), lambda tokens: 1.0)
    update.attach(SimpleNamespace(x=x), [Span(0, 16, True)])
    update.step(
        [x], [torch.full((16,), 0.5, dtype=torch.float64)], SimpleNamespace(tokens=20.0, committed=1), lambda v: v
    )
    assert x.tolist() == pytest.approx([-0.025] * 16), "norm 0.1: divided by its tokens and nothing else"


# ------------------------------------------------------------------ the rate
@pytest.mark.parametrize(
    "settings",
    [
        Infinite(warmup_tokens=250, settle_tokens=500) if kind is Infinite else kind(warmup=0.25)
        for kind in registry.kinds("schedule").values()
    ],
)
def test_every_schedule_rises_linearly_and_is_pure(settings: Constant | Cosine | Infinite | WarmupStableDecay) -> None:
    rate = factor(settings, 1000)
    assert [rate(t) for t in (0, 1, 125, 250)] == pytest.approx([0.0, 0.004, 0.5, 1.0])
    assert [rate(t) for t in (900, 10, 900)] == [rate(900), rate(10), factor(settings, 1000)(900)]
    values = [rate(t) for t in range(250, 1500, 10)]
    assert values == sorted(values, reverse=True), "it never rises again"
    assert rate(1000) == rate(10**9)


def test_shares_at_their_borders() -> None:
    assert factor(WarmupStableDecay(warmup=0.5, decay=0.5, floor=0.0), 1000)(750) == pytest.approx(0.5)
    assert factor(WarmupStableDecay(warmup=0.0, decay=0.0, floor=0.5), 1000)(999) == 1.0
    assert factor(Cosine(warmup=1.0, floor=0.1), 1000)(500) == pytest.approx(0.5)
    assert factor(Cosine(warmup=0.5, floor=0.0), 1000)(750) == pytest.approx(0.5)
    assert factor(Constant(warmup=0.0), 1000)(0) == 1.0
