"""The codes by themselves: what decoding leaves, and the pieces of top-k."""

from typing import Any

import numpy as np
import pytest
import torch

from hvdllm.exchange.wire import codecs

N = 4096 + 1288  # short last blocks of 256 and 1024
CODES = {
    "fp16": (codecs.CastCode(torch.float16, 2.0**-5), 4.0**-11, 1e-7),
    "bf16": (codecs.CastCode(torch.bfloat16), 4.0**-8, 0),
    "int8": (codecs.Int8Code(256), 256 / 4 / 127**2, 0),
    "sign": (codecs.SignCode("l1"), 1 - 1 / 1024, 0),
    "topk": (codecs.TopKCode(0.02), 1 - 108 / N, 0),
    "int8-odd": (codecs.Int8Code(100), 100 / 4 / 127**2, 0),
}


def rows(kind: str) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(3, N)))
    if kind == "spikes":  # one element is nearly all there is of its block
        x *= 1e-4
        x[:, ::1024] = torch.tensor([[3.0], [-2.0], [1.0]])
    if kind == "cubes":
        x = x**3 * 10.0 ** torch.linspace(-3, 2, N)
    if kind == "zeros":
        x[1] = 0
        x[2, 100:3000] = 0
    return x


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("kind", ["normal", "spikes", "cubes", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_brings_every_row_nearer(name: str, kind: str, dtype: torch.dtype) -> None:
    """|u - C(u)|² <= q |u|² with the q of each code."""
    code, share, least = CODES[name]
    u = rows(kind).to(dtype)
    payload = code.encode(u.clone())
    got = code.decode(payload, N, dtype)
    assert payload.dtype == torch.uint8 and payload.shape == code.encode(torch.zeros_like(u)).shape and len(got) == 3
    left, size = (u - got).square().sum(1), u.square().sum(1)
    assert (left <= share * size * (1 + 1e-5) + N * least**2).all()
    assert (left > 0).any()


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


def test_values_too_small_for_a_scale_are_left() -> None:
    u = torch.full((1, 512), 1e-37)  # 1 / (1e-37 / 127) is infinite in fp32
    u[0, 300] = 1.0
    payload = codecs.Int8Code(256).encode(u)
    got = codecs.Int8Code(256).decode(payload, 512, u.dtype)
    assert got[0, 300] == 1 and got.count_nonzero() == 1 and payload[0, :4].view(torch.float32) == 0


@pytest.mark.parametrize("kind", ["normal", "ties", "small sample", "nan"])
def test_the_largest_are_the_largest(kind: str) -> None:
    sizes = torch.from_numpy(np.random.default_rng(1).exponential(size=50_000)).float()
    if kind == "ties":
        sizes = sizes.floor()
    if kind == "small sample":  # it says too much is small: all have to be looked at
        sizes[::64] += 100
    if kind == "nan":
        sizes[1] = float("nan")
    k = 900
    got = codecs._largest(sizes, k)
    assert len(set(got.tolist())) == k
    want = np.sort(np.nan_to_num(sizes.numpy(), nan=np.inf))[-k:]
    assert np.array_equal(np.sort(np.nan_to_num(sizes[got].numpy(), nan=np.inf)), want)


def test_the_way_back_of_the_largest_carries_all_there_is() -> None:
    code: Any = codecs.TopKCode(0.02)
    u = rows("normal")
    u[:, 0] = 9  # where the filling stands
    decoded = code.decode(code.encode(u), N, torch.float64)
    total, back = decoded.sum(0, keepdim=True), code.back(3)
    payload = back.encode(total)
    assert torch.equal(back.decode(payload, N, torch.float64), total) and payload.shape[1] == 3 * 108 * 12
    assert torch.equal(back.decode(back.encode(total * 0), N, torch.float64), total * 0)
    wide = codecs.TopKCode(0.3)
    assert wide.back(3).encode(total).shape[1] == N * 8  # not more than the row as it is
