"""exchange=sharded: one process with the whole batch, although each rank holds only its part of the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
from checks import NAMES, OPTIMS, equals_one_process, stable_below

from hvdllm.exchange.parts import Sharded


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("optim", OPTIMS, ids=NAMES)
def test_it_equals_one_process(optim: Any, size: int) -> None:
    """Seen to catch: a gradient buffer that is not zeroed, a sum divided by the rank's own tokens, hooks that are armed
    for every micro-batch,
    weights that are not handed out, a norm of a rank's own pieces."""
    equals_one_process(Sharded(), optim, size)


def test_stable_below_the_bound_and_not_above() -> None:
    stable_below(Sharded(), 2.0)
