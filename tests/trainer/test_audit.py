"""What an audit sees, and what it must not see."""

from typing import Any

import pytest
import torch
from torch import nn

from hvdllm.errors import UserError
from hvdllm.flat import Flat
from hvdllm.tables import Table
from hvdllm.trainer.agree import agree_on_weights
from hvdllm.trainer.audit import Audit, _table, audit, fingerprint, spread
from hvdllm.world import virtual
from hvdllm.world.single import SingleWorld


def flat(ranks: int = 3, bucket_bytes: float = 100, dtype: torch.dtype = torch.float32) -> Flat:
    """Registration order (0.weight, 0.bias, 1.weight, ...) is not that of the map, where matrices come first."""
    own = Flat(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype), ranks, bucket_bytes)
    draw = torch.Generator().manual_seed(1)
    for name in own.at:
        own.view(name).copy_(torch.randn(own.parameters[name].shape, generator=draw))
    return own


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def audited(n: int, change: Any) -> list[Audit | None]:
    def body(world: Any) -> Audit | None:
        own = flat(n)
        change(own, world.rank)
        return audit(own, world)

    return virtual.run(n, body)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_equal_replicas(n: int) -> None:
    assert audited(n, lambda own, rank: None) == [None] * n
    assert audit(flat(), SingleWorld()) is None


def test_one_bit_is_named_with_its_rank() -> None:
    def flip(own: Flat, rank: int) -> None:
        if rank == 2:
            bits(own.view("1.weight"))[2, 4] ^= 1 << 9

    (found, *others) = audited(3, flip)
    assert others == [found, found], "every rank must say the same"
    assert found == Audit("1.weight", 2, False, 1) and str(found) == "`1.weight`, on rank 2"


def test_the_first_in_registration_order_is_named() -> None:
    def change(own: Flat, rank: int) -> None:
        if rank == 1:
            own.view("0.bias").detach()[0] += 1
            own.view("1.weight").detach()[0] += 1

    assert audited(4, change)[0] == Audit("0.bias", 1, False, 2)


@pytest.mark.parametrize("n", [2, 4])
def test_without_a_majority_it_says_so(n: int) -> None:
    def change(own: Flat, rank: int) -> None:
        own.view("0.bias").detach()[0] = rank % 2

    found = audited(n, change)[0]
    assert found == Audit("0.bias", 0, True, 1) and "on no rank" in str(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    own = flat(dtype=dtype)
    before = fingerprint(own)
    assert before.dtype == torch.int64 and before.shape == (4,)
    for name, element in (("0.weight", 0), ("0.weight", 34), ("0.bias", 4)):
        number = list(own.parameters).index(name)
        for bit in range(own.x.element_size() * 8):
            word = torch.tensor(1, dtype=bits(own.x).dtype) << bit
            bits(own.view(name).view(-1))[element] ^= word
            assert (fingerprint(own) != before).nonzero().tolist() == [[number]]
            bits(own.view(name).view(-1))[element] ^= word


def test_swapped_elements_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near ones, and whole chunks."""
    own = flat()
    before = fingerprint(own)
    weight = own.view("0.weight").detach().view(-1)
    for i, j in ((0, 1), (0, 2), (3, 33)):
        weight[[i, j]] = weight[[j, i]]
        assert (fingerprint(own) != before).tolist() == [True, False, False, False]
        weight[[i, j]] = weight[[j, i]]
    assert torch.equal(fingerprint(own), before)
    monkeypatch.setattr("hvdllm.trainer.audit.CHUNK", 2)
    whole = fingerprint(own)
    weight[:8] = weight[:8].roll(4)
    assert (fingerprint(own) != whole).tolist() == [True, False, False, False]


def test_padding_and_the_cut_of_the_map_are_not_seen() -> None:
    own, other = flat(3, 100), flat(5, 1e9)
    assert own.x.numel() != other.x.numel()
    padding = torch.ones_like(own.x, dtype=torch.bool)
    for place in own.at.values():
        padding[place] = False
    own.x[padding] = 7
    assert torch.equal(fingerprint(own), fingerprint(other))


def test_another_process_has_the_same_fingerprint() -> None:
    before = fingerprint(flat())
    _table.cache_clear()
    assert torch.equal(fingerprint(flat()), before)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_spread_is_the_relative_distance_to_the_mean(n: int) -> None:
    def body(world: Any) -> tuple[float, float, torch.Tensor]:
        own = flat(n, dtype=torch.float64)
        equal = spread(own, world)
        own.x *= 1 + world.rank
        before = own.x.clone()
        far = spread(own, world)
        assert torch.equal(own.x, before)
        return equal, far, before

    results = virtual.run(n, body)
    x = torch.stack([result[2] for result in results])
    mean = x.mean(0)
    expected = float((x - mean).square().sum(1).mean().sqrt() / mean.norm())
    for equal, far, _ in results:
        assert equal == pytest.approx(0, abs=1e-15) and far == pytest.approx(expected, rel=1e-12)
    assert (expected > 0.3) == (n > 1)


def test_a_run_does_not_begin_with_weights_that_changed_places() -> None:
    """Their sum is the same."""

    def live(world: Any) -> str:
        own = flat(2)
        if world.rank == 1:
            own.x[:2] = own.x[:2].flip(0)
        try:
            agree_on_weights(own, world)
        except UserError as error:
            return str(error)
        return ""

    assert all("the ranks drew different weights" in said for said in virtual.run(2, live))


def test_a_table_is_audited_and_agreed_on_too() -> None:
    """Seen to fail when only the flat map was looked at."""

    def live(world: Any) -> tuple[Audit | None, str]:
        model = nn.Sequential(Table(5, 3, 0.1, True), nn.Linear(3, 2))
        for p in model.parameters():
            p.data.fill_(0.5)
        own, said = Flat(model, 2, 100), ""
        agree_on_weights(own, world)
        if world.rank == 1:
            bits(own.tables["0"].weight.detach())[4, 2] ^= 1
        found = audit(own, world)
        try:
            agree_on_weights(own, world)
        except UserError as error:
            said = str(error)
        return found, said

    for found, said in virtual.run(2, live):
        assert found is not None and found.parameter == "0" and found.parameters == 1
        assert "the ranks drew different weights" in said


def test_spread_of_nothing() -> None:
    own = flat()
    own.x.zero_()
    assert spread(own, SingleWorld()) == 0

    def body(world: Any) -> float:
        own = flat(2)
        own.x *= 1 - 2 * world.rank
        return spread(own, world)

    assert virtual.run(2, body) == [float("inf")] * 2
