"""wire=sign: its two norms, its exact warm-up and its bytes."""

import numpy as np
import pytest
import torch
from wire_kit import Rig, blocks, equals_numpy, matrix_bytes, rows, run, whole_bytes

from hvdllm.exchange.wire import codecs
from hvdllm.exchange.wire.parts import Sign


def np_sign(u: np.ndarray) -> np.ndarray:
    return np.concatenate([np.where(b >= 0, 1, -1) * np.float64(np.float32(abs(b).mean())) for b in blocks(u, 1024)])


def np_sign_l2(u: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.where(b >= 0, 1, -1) * np.float64(np.float32((b * b).mean() ** 0.5)) for b in blocks(u, 1024)]
    )


def test_warm_up_is_exact_and_a_lone_rank_too() -> None:
    def body(rig: Rig) -> tuple[torch.Tensor, torch.Tensor, bool]:
        rig.wire.begin(99, 0.1)
        came = rig.fill(0)
        went = rig.sum()
        kept = rig.left().any()
        rig.wire.begin(100, 0.1)
        rig.fill(0)
        return came, went, bool(kept), torch.equal(rig.sum(), went)

    came, went, kept, same = zip(*run(3, Sign(warmup_tokens=100), body), strict=True)
    assert torch.allclose(went[0], sum(came), atol=1e-12) and not any(kept) and not any(same)
    came, went, kept, same = run(1, Sign(warmup_tokens=0), body)[0]
    assert torch.equal(came, went) and not kept and same


def test_the_norm_of_l2_overshoots_spikes() -> None:
    u = rows("spikes")[:, :1024]
    l1, l2 = (codecs.SignCode(norm).decode(codecs.SignCode(norm).encode(u), 1024, u.dtype) for norm in ("l1", "l2"))
    assert torch.allclose(l2.norm(dim=1), u.norm(dim=1)) and ((u - l2).norm(dim=1) > u.norm(dim=1)).all()
    assert ((u - l1).norm(dim=1) < u.norm(dim=1)).all()


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_is_positive(value: float) -> None:
    u = torch.full((1, 1024), value)
    u[0, 0] = -1024.0
    got = codecs.SignCode("l1").decode(codecs.SignCode("l1").encode(u), 1024, u.dtype)
    assert got[0, 0] == -1 and (got[0, 1:] == 1).all()


@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_algorithm_in_numpy(n: int) -> None:
    equals_numpy(n, Sign(warmup_tokens=0), np_sign, np_sign)


@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_algorithm_in_numpy_by_root_mean_squares(n: int) -> None:
    equals_numpy(n, Sign(warmup_tokens=0, scale="l2"), np_sign_l2, np_sign_l2)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes(n: int) -> None:
    """Of the bucket of matrices, against fp32."""
    assert matrix_bytes(n, Sign(warmup_tokens=0)) / whole_bytes(n) == pytest.approx(0.0323, rel=0.006)
