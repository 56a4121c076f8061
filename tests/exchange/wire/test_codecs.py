"""The codes by themselves: what decoding leaves of rows of any kind."""

import pytest
import torch
from wire_kit import LENGTH, rows

from hvdllm.exchange.wire import codecs

CODES = {
    "fp16": (codecs.CastCode(torch.float16, 2.0**-5), 4.0**-11, 1e-7),
    "bf16": (codecs.CastCode(torch.bfloat16), 4.0**-8, 0),
    "int8": (codecs.Int8Code(256), 256 / 4 / 127**2, 0),
    "sign": (codecs.SignCode("l1"), 1 - 1 / 1024, 0),
    "topk": (codecs.TopKCode(0.02), 1 - 108 / LENGTH, 0),
    "int8-odd": (codecs.Int8Code(100), 100 / 4 / 127**2, 0),
}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("kind", ["normal", "spikes", "cubes", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_brings_every_row_nearer(name: str, kind: str, dtype: torch.dtype) -> None:
    """|u - C(u)|² <= q |u|² with the q of each code."""
    code, share, least = CODES[name]
    u = rows(kind).to(dtype)
    payload = code.encode(u.clone())
    got = code.decode(payload, LENGTH, dtype)
    assert payload.dtype == torch.uint8 and payload.shape == code.encode(torch.zeros_like(u)).shape and len(got) == 3
    left, size = (u - got).square().sum(1), u.square().sum(1)
    assert (left <= share * size * (1 + 1e-5) + LENGTH * least**2).all()
    assert (left > 0).any()
