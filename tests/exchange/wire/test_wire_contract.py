"""What every wire promises (Wire in hvdllm/exchange/base.py). The wires come from the registry, so that a new one is
tested by being registered."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from wire_kit import NOMINAL, Rig, matrix_bytes, run, whole_bytes

from hvdllm import registry
from hvdllm.exchange.wire.parts import Sign, TopK, Wire

AT_WORK = {"warmup_tokens": 0, "rank": 3}  # from the first sum on, and on small matrices
PARTS = registry.parts("wire")


def at_work(kind: type[Wire]) -> Wire:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in AT_WORK.items() if name in names})


EVERY: dict[str, Any] = {name: at_work(part.settings) for name, part in PARTS.items()}
EVERY["sign-l2"] = Sign(warmup_tokens=0, scale="l2")
LOSSY = [name for name, settings in EVERY.items() if not registry.of("wire", settings).facts.exact]
CUT = [name for name, settings in EVERY.items() if registry.PIECES in registry.of("wire", settings).facts.carries]
KEEPS = {**{name: EVERY[name] for name in LOSSY}, "topk-momentum": TopK(warmup_tokens=0, momentum=0.9)}
every_wire = pytest.mark.parametrize("settings", EVERY.values(), ids=list(EVERY))
each_that_keeps = pytest.mark.parametrize("settings", KEEPS.values(), ids=list(KEEPS))


@every_wire
def test_facts_are_what_the_wire_does(settings: Any) -> None:
    """An exact wire lands the sum itself and keeps nothing; another lands something else and keeps the rest."""
    facts = registry.of("wire", settings).facts

    def body(rig: Rig) -> tuple[torch.Tensor, torch.Tensor, bool]:
        rig.wire.begin(0, 0.1)
        return rig.fill(0), rig.sum(), bool(rig.left().any())

    came, went, kept = zip(*run(3, settings, body), strict=True)
    assert torch.allclose(went[0], sum(came), rtol=1e-12, atol=1e-12) == facts.exact
    assert any(kept) != facts.exact and all(torch.equal(each, went[0]) for each in went)
    again = run(3, settings, body)
    assert torch.equal(again[0][1], went[0]), "the same ranks and gradients give the same bits"
    assert (matrix_bytes(2, settings) == whole_bytes(2)) == facts.exact, "and fewer bytes"


@pytest.mark.parametrize("name", CUT)
def test_what_is_handed_out_again_is_exact(name: str) -> None:
    """Weights travel in full precision, whatever the wire does to sums."""

    def body(rig: Rig) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = rig.scatter()
        rig.flat.g.copy_(pieces)
        spans = rig.flat.slices(rig.world.rank, 3)
        flights = [rig.wire.spread(pieces[s.start : s.stop].clone(), f"param.{b}") for b, s in enumerate(spans)]
        return pieces, torch.cat([flight.land() for flight in flights])

    pieces, spread = zip(*run(3, EVERY[name], lambda rig: (rig.fill(0), body(rig))[1]), strict=True)
    assert all(torch.equal(each, sum(pieces)) for each in spread) and spread[0].any()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_that_came_in_is_decoded_or_kept(name: str, n: int) -> None:
    weights = np.linspace(0.02, 0.3, 30)
    weights[[0, 11]] = 0

    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = went = torch.zeros_like(rig.flat.x)
        for t, weight in enumerate(weights):
            rig.wire.begin(t * NOMINAL, weight)
            came = came + weight * rig.fill(t)
            went = went + weight * rig.sum()
        assert rig.left().any()
        return came, went, weights[-1] * rig.left(), rig.flat.g

    came, went, left, last = zip(*run(n, EVERY[name], body), strict=True)
    assert torch.allclose(went[0] + sum(left), sum(came), rtol=0, atol=1e-9 * sum(came).abs().max().item())
    for other in range(1, n):
        assert torch.equal(went[other], went[0]) and torch.equal(last[other], last[0])


@pytest.mark.parametrize("name", CUT)
def test_a_scatter_keeps_what_it_leaves_and_rounds_once(name: str) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = went = torch.zeros_like(rig.flat.x)
        for t in range(12):
            rig.wire.begin(t * NOMINAL, 0.1)
            came = came + rig.fill(t)
            went = went + rig.scatter()
        assert "owner" not in rig.saved()[1]
        return came, went, rig.left()

    came, went, left = (sum(each) for each in zip(*run(3, EVERY[name], body), strict=True))
    assert torch.allclose(went + left, came, rtol=0, atol=1e-9 * came.abs().max().item())


@pytest.mark.parametrize("settings", [*EVERY.values(), TopK(warmup_tokens=3 * NOMINAL)], ids=[*EVERY, "topk-warm-up"])
def test_a_sum_launched_before_the_last_has_landed_is_the_same(settings: Any) -> None:
    """Weight and density are fixed at the launch: the driver thread may be late. Two in flight at most."""

    def body(rig: Rig, late: bool) -> torch.Tensor:
        flights, vectors = [], []
        for t, weight in enumerate((0.1, 0.3, 0.2)):
            rig.wire.begin(t * NOMINAL, weight)
            vectors.append(rig.fill(t)[: rig.flat.buckets[0].span.stop])
            flights.append(rig.wire.sum(vectors[-1], "grad.0"))
            if not late:
                flights[-1].land()
            elif t:
                flights[-2].land()
        flights[-1].land()
        return torch.cat([*vectors, rig.left()])

    late, soon = (run(3, settings, partial(body, late=late)) for late in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(late, soon, strict=True))


@every_wire
def test_padding_stays_empty(settings: Any) -> None:
    def body(rig: Rig) -> torch.Tensor:
        used = torch.zeros_like(rig.flat.x)
        for place in rig.flat.at.values():
            used[place] = 1
        for t in range(3):
            rig.fill(t)
            rig.sum()
        return ((rig.flat.g.abs() + rig.left().abs()) * (1 - used)).sum()

    assert run(4, settings, body) == [0, 0, 0, 0]


@every_wire
def test_what_is_not_finite_arrives_as_something_that_is_not(settings: Any) -> None:
    def body(rig: Rig, bad: float) -> float:
        rig.fill(0)
        if rig.world.rank == 1:
            rig.flat.g[777] = bad
        return rig.sum()[: rig.flat.buckets[0].span.stop].norm().item()

    for bad in (float("nan"), float("inf")):
        assert not any(np.isfinite(norm) for norm in run(2, settings, partial(body, bad=bad)))


@each_that_keeps
def test_goes_on_bit_equal_at_the_same_size(settings: Any) -> None:
    def first(rig: Rig) -> Any:
        for t in range(3):
            rig.wire.begin(t, 0.1 * (t + 1))
            rig.fill(t)
            rig.sum()
        saved = rig.saved()
        rig.wire.begin(3, 0.7)
        rig.fill(3)
        return saved, rig.sum()

    results = run(3, settings, first)

    def second(rig: Rig) -> torch.Tensor:
        rig.wire.load(*results[rig.world.rank][0])
        rig.wire.begin(3, 0.7)
        rig.fill(3)
        return rig.sum()

    assert all(torch.equal(a, b[1]) for a, b in zip(run(3, settings, second), results, strict=True))
    forgotten = run(3, settings, lambda rig: (rig.fill(3), rig.sum())[1])
    assert not torch.equal(forgotten[0], results[0][1])


def tensors(rig: Rig, vector: torch.Tensor) -> torch.Tensor:
    """Without padding, which differs between world sizes."""
    return torch.cat([vector[place] for place in rig.flat.at.values()])


def reloaded(rig: Rig, results: list[Any]) -> None:
    """As a checkpoint of another world size is: rank 0 gets the sums, the others zeros."""
    shared, summed, extra = results[0][0]
    given = {}
    for kind in summed:
        total = sum(result[3][kind] for result in results)
        given[kind] = torch.zeros_like(rig.flat.x)
        end = 0
        for place in rig.flat.at.values() if rig.world.rank == 0 else ():
            given[kind][place] = total[end : end + place.stop - place.start]
            end += place.stop - place.start
    rig.wire.load(shared, given, extra)


@each_that_keeps
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (4, 1)])
def test_another_size_keeps_the_total(settings: Any, sizes: tuple[int, int]) -> None:
    def first(rig: Rig) -> Any:
        for t in range(3):
            rig.wire.begin(t, 0.1 * (t + 1))
            rig.fill(t)
            rig.sum()
        saved = rig.saved()
        return saved, tensors(rig, rig.left()), None, {kind: tensors(rig, v) for kind, v in saved[1].items()}

    results = run(sizes[0], settings, first)
    kept = sum(result[1] for result in results)

    def second(rig: Rig) -> Any:
        reloaded(rig, results)
        before = tensors(rig, rig.left())
        velocity = rig.saved()[1].get("velocity")
        rig.wire.begin(3, 0.7)
        came = rig.fill(3)
        went = rig.sum()
        speed = torch.zeros_like(kept) if velocity is None else 0.9 * tensors(rig, velocity)
        return before, tensors(rig, came) + speed, tensors(rig, went), tensors(rig, rig.left())

    before, came, went, left = zip(*run(sizes[1], settings, second), strict=True)
    assert torch.allclose(sum(before), kept, rtol=1e-12, atol=1e-12)
    assert torch.allclose(went[0] + sum(left), sum(came) + kept * (0.3 / 0.7), rtol=1e-9, atol=1e-9)
