"""What a lossy wire keeps, under weights that rise and fall."""

from typing import Any

import numpy as np
import pytest
import torch
from wire_kit import NOMINAL, Rig, run

from hvdllm.exchange.wire.parts import Int8, Sign, TopK


def test_at_weight_zero_residuals_stay_what_they_were_worth() -> None:
    def body(rig: Rig) -> list[torch.Tensor]:
        factors = []
        for weight in (0.0, 0.2, 0.0, 0.4):
            rig.wire.begin(0, weight)
            factors.append(rig.wire.launch("grad.0").factor)
        return factors

    assert run(1, Int8(), body)[0] == [0.0, 1.0, 0.0, 0.5]


def test_an_exact_sum_of_no_weight_leaves_what_is_kept_and_the_next_spends_it_all() -> None:
    """As in a warm-up of the rate from 0, or a round that nobody commits."""

    def body(rig: Rig) -> list[Any]:
        index = rig.flat.buckets[0].index
        rig.wire.begin(0, 0.2)
        rig.wire.launch("grad.0")
        rig.wire.residual[index] = torch.ones_like(rig.flat.x[: rig.flat.buckets[0].span.stop])
        seen = []
        for weight in (0.0, 0.4, 0.4):
            rig.wire.begin(0, weight)
            x = torch.zeros_like(rig.wire.residual.get(index, seen[-1] if seen else None))
            seen.append(rig.wire.spend(x, rig.wire.launch("grad.0")))
        return [x.unique().tolist() for x in seen]

    assert run(1, Sign(warmup_tokens=NOMINAL), body)[0] == [[0.0], [0.5], [0.0]]


@pytest.mark.parametrize("settings", [TopK(warmup_tokens=0), Sign(warmup_tokens=0)], ids=["topk", "sign"])
def test_a_rate_that_falls_to_nothing_leaves_the_decoded_sum_bounded(settings: Any) -> None:
    """schedule=wsd with its floor of 0. Weighed by old over new rate alone, the last sums are made of old residuals: 15
    and 4 times as long as those before the fall."""

    def body(rig: Rig) -> list[float]:
        norms = []
        for t, weight in enumerate([*[1.0] * 30, *np.linspace(1, 1 / 41, 41)]):
            rig.wire.begin(t * NOMINAL, float(weight))
            rig.fill(t)
            norms.append(rig.sum().norm().item())
        return norms

    norms = run(2, settings, body)[0]
    assert max(norms[30:]) < 4 * max(norms[:30])
