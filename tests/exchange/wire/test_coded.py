"""What the coded wires have in common: two roundings, chunks that change nothing, and vectors."""

from typing import Any

import pytest
import torch
from wire_kit import Rig, run

from hvdllm.exchange.wire.parts import Bf16, Fp16, Int8, Sign, TopK

CODED = [Fp16(), Bf16(), Int8(), TopK(warmup_tokens=0), Sign(warmup_tokens=0), Sign(warmup_tokens=0, scale="l2")]


NAMES = ["fp16", "bf16", "int8", "topk", "sign", "sign-l2"]


@pytest.mark.parametrize(
    "settings", [Fp16, Bf16, Int8, lambda **k: Sign(warmup_tokens=0, **k)], ids=["fp16", "bf16", "int8", "sign"]
)
def test_chunks_change_nothing(settings: Any) -> None:
    """Pieces of 13,000 elements in four chunks, of which the last is short, or in one."""

    def body(rig: Rig) -> torch.Tensor:
        for t in range(3):
            rig.fill(t)
            rig.sum()
        return torch.cat([rig.flat.g, rig.left()])

    whole, cut = run(3, settings(), body), run(3, settings(chunk_mb=0.08), body)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("settings", [TopK(warmup_tokens=0), Sign(warmup_tokens=0)], ids=["topk", "sign"])
def test_vectors_travel_whole_where_the_code_is_coarse(settings: Any) -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, ...]:
        span = rig.flat.buckets[2].span
        return rig.fill(0)[span.start : span.stop], rig.sum()[span.start : span.stop]

    came, went = zip(*run(3, settings, body), strict=True)
    assert torch.allclose(went[0], sum(came), atol=1e-12)
