"""Two levels: the flat sum, the flat pieces, few bytes between hosts, and residuals that find their owners."""

from typing import Any

import pytest
import torch
from wire_kit import Rig, run

from hvdllm.errors import UserError
from hvdllm.exchange.wire.hierarchical import Hierarchical
from hvdllm.exchange.wire.parts import Bf16, Fp16, Fp32, Int8, Sign, TopK

SHAPES = [(4, 2), (6, 2), (6, 3), (4, 1), (3, 3)]  # ranks, hosts
shapes = pytest.mark.parametrize(("n", "hosts"), SHAPES)


@shapes
def test_is_the_flat_sum(n: int, hosts: int) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = rig.fill(0)
        first = rig.sum()
        rig.fill(0)
        return came, first, rig.sum()

    came, went, again = zip(*run(n, Fp32(hierarchical=True), body, hosts), strict=True)
    assert torch.allclose(went[0], sum(came), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(each, went[0]) for each in (*went, *again))


@shapes
def test_a_scatter_gives_the_piece_of_this_rank_and_spread_is_the_way_back(n: int, hosts: int) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came, pieces = rig.fill(0), rig.scatter()
        spans = rig.flat.slices(rig.world.rank, n)
        flights = [rig.wire.spread(pieces[s.start : s.stop].clone(), f"param.{b}") for b, s in enumerate(spans)]
        return came, pieces, torch.cat([flight.land() for flight in flights])

    came, pieces, spread = zip(*run(n, Fp32(hierarchical=True), body, hosts), strict=True)
    assert torch.allclose(sum(pieces), sum(came), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(each, sum(pieces)) for each in spread)


def test_bytes_between_hosts() -> None:
    def body(rig: Rig) -> tuple[float, float, int]:
        before = rig.world.bytes_sent
        rig.fill(0)
        rig.sum()
        return rig.wire.cross.bytes_sent, rig.world.bytes_sent - before, rig.flat.x.nbytes

    for settings, share in ((Fp32(hierarchical=True), 1.0), (Fp16(hierarchical=True), 0.5)):
        for cross, everything, size in run(4, settings, body, 2, torch.float32):
            assert cross == pytest.approx(2 * (2 - 1) / 2 * size / 2 * share, rel=1e-6)
            assert everything == pytest.approx(cross + size, rel=1e-6)  # half of it there and half back in the host


CODED = [Bf16(hierarchical=True), Int8(hierarchical=True, chunk_mb=0.05), Sign(hierarchical=True, warmup_tokens=0)]
CODED += [TopK(hierarchical=True, warmup_tokens=0, momentum=0.5), TopK(hierarchical=True, warmup_tokens=0)]
IDS = ["bf16", "int8", "sign", "topk-momentum", "topk"]


@pytest.mark.parametrize("settings", CODED[:3] + CODED[4:], ids=[*IDS[:3], "topk"])
@pytest.mark.parametrize("way", ["sum", "scatter"])
@shapes
def test_coded_across_hosts_nothing_is_lost(settings: Any, way: str, n: int, hosts: int) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        came = went = torch.zeros_like(rig.flat.x)
        for t in range(8):
            rig.wire.begin(t, t + 1)
            came = came + (t + 1) * rig.fill(t)
            went = went + (t + 1) * getattr(rig, way)()
        return came, went, 8 * rig.left()

    came, went, left = zip(*run(n, settings, body, hosts), strict=True)
    out = went[0] if way == "sum" else sum(went)
    assert torch.allclose(out + sum(left), sum(came), rtol=0, atol=1e-9 * sum(came).abs().max().item())
    assert all(torch.equal(each, went[0]) for each in went) or way == "scatter"
    assert any(each.any() for each in left) == (hosts > 1), "inside one host nothing is coded"


@pytest.mark.parametrize("settings", CODED, ids=IDS)
def test_residuals_find_their_owners(settings: Any) -> None:
    """At the same size bit for bit; at another, or another layout of hosts, the total is kept."""

    def first(rig: Rig) -> Any:
        for t in range(3):
            rig.wire.begin(t, 0.1)
            rig.fill(t)
            rig.sum()
        saved = rig.saved()
        rig.fill(3)
        return saved, rig.sum()

    results = run(4, settings, first, 2)

    def second(rig: Rig) -> torch.Tensor:
        rig.wire.load(*results[rig.world.rank][0])
        rig.wire.begin(3, 0.1)
        rig.fill(3)
        return rig.sum()

    assert all(torch.equal(got, result[1]) for got, result in zip(run(4, settings, second, 2), results, strict=True))
    total = {kind: sum(result[0][1][kind] for result in results) for kind in results[0][0][1]}

    def third(rig: Rig) -> dict[str, torch.Tensor]:  # as at another size: rank 0 has it all
        given = {kind: vector * (rig.world.rank == 0) for kind, vector in total.items()}
        rig.wire.load(results[0][0][0], given, {})
        return rig.saved()[1]

    for hosts in (2, 4, 1):
        loaded = run(4, settings, third, hosts)
        for kinds in (("residual", "owner"), ("velocity",)):
            want = sum(total.get(kind, 0 * total["residual"]) for kind in kinds)
            got = sum(each.get(kind, 0 * want) for each in loaded for kind in kinds)
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-12) and want.any() == (
                kinds[0] == "residual" or "velocity" in total
            )


def test_the_warm_up_is_the_inner_wires() -> None:
    def body(rig: Rig) -> list[bool]:
        kept = []
        for committed in (99, 100):
            rig.wire.begin(committed, 0.1)
            rig.fill(0)
            rig.sum()
            kept.append(bool(rig.left().any()))
        return kept

    assert run(4, Sign(hierarchical=True, warmup_tokens=100), body, 2) == [[False, True]] * 4


def test_ranks_must_stand_host_by_host() -> None:
    def body(rig: Rig) -> None:
        rig.world.local_rank, rig.world.local_size = divmod(rig.world.rank, 2)[0], 2
        Hierarchical(rig.world, Fp32(hierarchical=True), rig.flat, 1, type(rig.wire))

    with pytest.raises(UserError, match=r"numbered host by host.*\(0, 2\), \(0, 2\), \(1, 2\), \(1, 2\)"):
        run(4, Fp32(), body)
