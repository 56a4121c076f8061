"""The k largest are those that sorting finds, also where the sample that bounds the search misleads."""

from __future__ import annotations

import pytest
import torch

from hvdllm.exchange.wire import codecs


@pytest.mark.parametrize("k", [1, 5, 9, 10, 11, 40, 300])
def test_the_largest_are_found_though_all_large_numbers_were_sampled(k: int) -> None:
    """Each 64th number is looked at first: here those alone are large, and fewer than k pass the bound."""
    sizes = torch.arange(64 * 200) / 1e6
    sizes[::64] += torch.arange(200) + 1.0
    found = codecs._largest(sizes, k)
    assert sorted(found.tolist()) == sorted(sizes.argsort(descending=True)[:k].tolist())
