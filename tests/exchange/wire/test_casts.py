"""wire=fp16 and wire=bf16: the roundings, the range and the bytes of the two casts."""

from typing import Any

import numpy as np
import pytest
import torch
from wire_kit import Rig, equals_numpy, matrix_bytes, run, whole_bytes

from hvdllm.exchange.wire.build import make_wire
from hvdllm.exchange.wire.parts import Bf16, Fp16, Fp32


def np_fp16(u: np.ndarray) -> np.ndarray:
    scaled = (u * 2.0 ** (10 - 12)).astype(np.float32)  # 3000 tokens a batch: at most 2^12
    return scaled.astype(np.float16).astype(np.float64) * 4


def np_bf16(u: np.ndarray) -> np.ndarray:
    bits = u.astype(np.float32).view(np.uint32)
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).astype(np.float64)


def test_sums_that_a_prescale_of_1_over_n_overflows() -> None:
    """Mean gradients of 1e-6 to 16 over 65,536 tokens of 4 ranks keep 9 of 11 bits; beyond 64 infinity says so."""
    tokens = 65_536
    means = torch.cat([10.0 ** torch.linspace(-6, 1.2, 48), -(10.0 ** torch.linspace(-6, 1.2, 48))])

    def body(rig: Rig) -> torch.Tensor:
        wire = make_wire(Fp16(), rig.world, rig.flat, tokens)
        x = rig.flat.g[: rig.flat.buckets[0].span.stop]
        x.zero_()[:96] = means * tokens * (rig.world.rank + 1) / 10
        wire.sum(x, "grad.0").land()
        good = x[:96] / tokens
        x.zero_()[0] = 130.0 * tokens / 4
        wire.sum(x, "grad.0").land()
        return torch.cat([good, x[:1]])

    for got in run(4, Fp32(), body, dtype=torch.float32):
        assert ((got[:96] / means - 1).abs() < 4 * 2.0**-11).all()
        assert not torch.isfinite(got[96])


CASTS = pytest.mark.parametrize(("settings", "code"), [(Fp16(), np_fp16), (Bf16(), np_bf16)], ids=["fp16", "bf16"])


@CASTS
@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_algorithm_in_numpy(settings: Any, code: Any, n: int) -> None:
    equals_numpy(n, settings, code, code)


@CASTS
@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes(settings: Any, code: Any, n: int) -> None:
    """Of the bucket of matrices, against fp32."""
    assert matrix_bytes(n, settings) / whole_bytes(n) == pytest.approx(0.5, rel=0.006)
