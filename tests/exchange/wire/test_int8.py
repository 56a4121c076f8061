"""wire=int8: its numbers, its chunks and its bytes."""

import numpy as np
import pytest
import torch
from wire_kit import blocks, equals_numpy, matrix_bytes, whole_bytes

from hvdllm.exchange.wire import codecs
from hvdllm.exchange.wire.parts import Int8


def np_int8(u: np.ndarray) -> np.ndarray:
    out = []
    for b in blocks(u, 256):
        scale = np.float32(abs(b).max() / 127)
        inverse = 1 / scale if scale else scale
        out.append(np.clip(np.rint(b * np.float64(inverse)), -127, 127) * np.float64(scale))
    return np.concatenate(out)


def test_values_too_small_for_a_scale_are_left() -> None:
    u = torch.full((1, 512), 1e-37)  # 1 / (1e-37 / 127) is infinite in fp32
    u[0, 300] = 1.0
    payload = codecs.Int8Code(256).encode(u)
    got = codecs.Int8Code(256).decode(payload, 512, u.dtype)
    assert got[0, 300] == 1 and got.count_nonzero() == 1 and payload[0, :4].view(torch.float32) == 0


@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_algorithm_in_numpy(n: int) -> None:
    equals_numpy(n, Int8(), np_int8, np_int8)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes(n: int) -> None:
    """Of the bucket of matrices, against fp32."""
    assert matrix_bytes(n, Int8()) / whole_bytes(n) == pytest.approx(0.2539, rel=0.006)
