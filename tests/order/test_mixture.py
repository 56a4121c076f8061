"""The order of a mixture: shares hold, each data set goes through its own epochs, and positions are pure."""

import numpy as np
import pytest

from hvdllm.order.mixture import BLOCK, Mixture, counted


@pytest.mark.parametrize("shares", [[0.7, 0.3], [0.25, 0.25, 0.5], [1.0], [1 / 3, 2 / 3]])
def test_shares_that_have_a_short_block_are_exact(shares: list[float]) -> None:
    counts = counted(shares)
    assert sum(counts) <= 10
    assert [count / sum(counts) for count in counts] == pytest.approx(shares, abs=1e-12)


def test_other_shares_are_exact_to_half_an_item_of_a_long_block() -> None:
    shares = np.random.default_rng(0).dirichlet([1, 1, 5, 0.3])
    counts = counted(list(shares))
    assert sum(counts) == BLOCK and min(counts) >= 1
    assert np.abs(np.array(counts) / BLOCK - shares).max() <= 1 / BLOCK


def test_each_data_set_goes_through_its_own_epochs() -> None:
    """Seen to catch: an occurrence that is counted anew in each block, one order for data sets of one size."""
    sizes, mixture = [6, 6, 20], Mixture([6, 6, 20], [0.5, 0.3, 0.2], seed=3)
    items, epochs = mixture.visits(np.arange(600))
    owners = np.searchsorted(np.cumsum([0, *sizes]), items, side="right") - 1
    assert np.bincount(owners).tolist() == [300, 180, 120]
    for owner, (size, first) in enumerate(zip(sizes, (0, 6, 12), strict=True)):
        own, when = items[owners == owner] - first, epochs[owners == owner]
        assert when.tolist() == (np.arange(len(own)) // size).tolist()
        for epoch in range(len(own) // size):
            assert sorted(own[when == epoch]) == list(range(size))
    assert (items[owners == 0][:6] != items[owners == 1][:6] - 6).any()


def test_a_position_is_the_same_however_it_is_asked_for() -> None:
    mixture = Mixture([10, 30], [0.6, 0.4], seed=1)
    whole = mixture.visits(np.arange(200))
    shuffled = np.random.default_rng(0).permutation(200)
    again = Mixture([10, 30], [0.6, 0.4], seed=1).visits(shuffled)
    assert all((a[shuffled] == b).all() for a, b in zip(whole, again, strict=True))
    assert (Mixture([10, 30], [0.6, 0.4], seed=2).visits(np.arange(200))[0] != whole[0]).any()


def test_blocks_have_orders_of_their_own() -> None:
    items, _ = Mixture([5, 5], [0.5, 0.5], seed=0).visits(np.arange(200))
    owners = (items >= 5).astype(int)
    pairs = {tuple(owners[at : at + 2]) for at in range(0, 200, 2)}
    assert pairs == {(0, 1), (1, 0)}
