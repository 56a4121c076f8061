"""Codes of the coded wires: from rows of numbers to rows of bytes and back, many blocks at once.

encode       from [rows, n] to uint8 [rows, bytes]. n is a multiple of 8, and the number of bytes is a function of n and
             the dtype alone
decode       the inverse, up to what the code leaves out. The same bytes give the same numbers on every rank
back(ranks)  the code of the way back, for the sum of so many decoded rows
exact        what is decoded is what was encoded: nothing is left out
keeps_zeros  zeros stay zeros, so that the padding of the flat vector stays zero

What is not finite is decoded as something that is not finite, so that the norm of the sum shows it. Scales and
multiples are little-endian fp32 and integers, whatever the dtype of the gradients. The values of top-k have the
gradients' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch.nn.functional import pad

SIGN_BLOCK = 1024
SMALLEST = torch.finfo(torch.float32).tiny


class Codec(Protocol):
    """What its words mean stands above."""

    exact: bool
    keeps_zeros: bool

    def encode(self, u: torch.Tensor) -> torch.Tensor: ...

    def decode(self, payload: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor: ...

    def back(self, ranks: int) -> Codec: ...


class TwoWay:
    """A code that is used both ways, leaves something out and keeps zeros, as most do."""

    exact = False
    keeps_zeros = True

    def back(self, ranks: int) -> Self:
        return self


@dataclass(frozen=True)
class CastCode(TwoWay):
    """Each number times `scale` in a shorter dtype; error at most 2^-11 (fp16) or 2^-8 (bf16) of it."""

    dtype: torch.dtype
    scale: float = 1.0  # a power of two, so that it costs no precision

    def encode(self, u: torch.Tensor) -> torch.Tensor:
        return (u if self.scale == 1 else u * self.scale).to(self.dtype).view(torch.uint8)

    def decode(self, payload: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
        out = payload.view(self.dtype).to(dtype)
        return out if self.scale == 1 else out.mul_(1 / self.scale)


@dataclass(frozen=True)
class Int8Code(TwoWay):
    """Blocks of `block` numbers as multiples from -127 to 127 of their largest / 127. The error is at most their
    largest / 254.

    Bytes of a row: the scales in fp32, the multiples, and zeros up to a multiple of 8.
    """

    block: int

    def encode(self, u: torch.Tensor) -> torch.Tensor:
        blocks = _blocks(u, self.block)
        scale = (blocks.abs().amax(2) / 127).float()
        scale.masked_fill_(scale < SMALLEST, 0)  # else 1 / scale may be infinite; such small numbers are left for later
        inverse = (1 / scale).masked_fill_(scale == 0, 0)
        steps = (blocks * inverse.unsqueeze(2)).round_().to(torch.int8)
        return _pack([scale, steps.view(len(u), -1)[:, : u.shape[1]]])

    def decode(self, payload: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
        count = -(-n // self.block)
        scale, steps = payload[:, : 4 * count].view(torch.float32), payload[:, 4 * count : 4 * count + n]
        return _scale(steps.view(torch.int8).to(dtype), scale, self.block)


@dataclass(frozen=True)
class SignCode(TwoWay):
    """One bit a number, 1 for u >= 0, and a scale for each block of 1024: mean |u| (l1) or root mean square (l2).

    Scales are of fixed blocks and not of tensors. So a bucket may be cut anywhere, a block that has only zeros (rows of
    an embedding that no token used) stays zero, and the scales add 3 % to the bits.

    Bytes of a row: the scales in fp32, the bits with the first number in the lowest one, and zeros up to a multiple of
    8.
    """

    norm: str

    keeps_zeros = False

    def encode(self, u: torch.Tensor) -> torch.Tensor:
        n = u.shape[1]
        blocks = _blocks(u, SIGN_BLOCK)
        counts = torch.full((blocks.shape[1],), SIGN_BLOCK, dtype=u.dtype, device=u.device)
        counts[-1] -= blocks[0].numel() - n
        if self.norm == "l1":
            scale = blocks.abs().sum(2) / counts
        else:
            scale = (blocks.square().sum(2) / counts).sqrt()
        # Eight bytes that are 0 or 1 are one int64; this factor moves byte j to bit 56 + j, and no two bits meet.
        bits = (u >= 0).view(torch.int64).mul(0x0102040810204080).bitwise_right_shift(56).to(torch.uint8)
        return _pack([scale.float(), bits])

    def decode(self, payload: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
        count = -(-n // SIGN_BLOCK)
        scale, bits = payload[:, : 4 * count].view(torch.float32), payload[:, 4 * count : 4 * count + n // 8]
        signs = _signs(dtype, payload.device).index_select(0, bits.reshape(-1).int()).view(len(payload), n)
        return _scale(signs, scale, SIGN_BLOCK)


@dataclass(frozen=True)
class TopKCode:
    """Of each row the `share` of numbers that are largest by size (at least one), exactly; the others become 0.

    Bytes of a row: the values, their places as int32, and zeros up to a multiple of 8. Where this would not be less
    than the row as it is, the row travels as it is.
    """

    share: float

    exact = False
    keeps_zeros = True

    def count(self, n: int) -> int:
        return min(n, max(1, math.ceil(self.share * n)))

    def encode(self, u: torch.Tensor) -> torch.Tensor:
        k = self.count(u.shape[1])
        if _whole(k, u.shape[1], u.itemsize):
            return u.contiguous().view(torch.uint8)
        picked = list(self.pick(u, k))
        return _pack([torch.stack([v for v, _ in picked]), torch.stack([i for _, i in picked]).int()])

    def pick(self, u: torch.Tensor, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """k values of each row and their places."""
        for row in u:
            places = _largest(row.abs(), k)
            yield row[places], places

    def decode(self, payload: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
        k = self.count(n)
        if _whole(k, n, dtype.itemsize):
            return payload.view(dtype)
        middle = k * dtype.itemsize
        values, places = payload[:, :middle].view(dtype), payload[:, middle : middle + 4 * k].view(torch.int32)
        out = torch.zeros(len(payload), n, dtype=dtype, device=payload.device)
        return out.scatter_add_(1, places.long(), values)  # added, because the filling of NonZeroCode stands at place 0

    def back(self, ranks: int) -> Codec:
        return NonZeroCode(self.share, ranks)


@dataclass(frozen=True)
class NonZeroCode(TopKCode):
    """All numbers that are not zero of a sum of `ranks` rows of TopKCode. Zeros at place 0 fill them up to as many as
    there can be."""

    ranks: int

    exact = True

    def count(self, n: int) -> int:
        return min(n, self.ranks * super().count(n))

    def pick(self, u: torch.Tensor, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row in u:
            places = row.nonzero().view(-1)
            yield pad(row[places], (0, k - len(places))), pad(places, (0, k - len(places)))

    def back(self, ranks: int) -> Codec:
        raise NotImplementedError("the way back ends here")


# ------------------------------------------------------------------ inside
def _blocks(u: torch.Tensor, block: int) -> torch.Tensor:
    """[rows, blocks, block], zeros at the end."""
    rest = -u.shape[1] % block
    return (pad(u, (0, rest)) if rest else u).view(len(u), -1, block)


def _scale(x: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """In place: each block of a row times its scale."""
    full = x.shape[1] // block
    x[:, : full * block].view(len(x), full, block).mul_(scale[:, :full].unsqueeze(2))
    if full * block < x.shape[1]:
        x[:, full * block :].mul_(scale[:, full:])
    return x


def _pack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of several dtypes as rows of bytes, one part after the other."""
    sizes = [part.shape[1] * part.itemsize for part in parts]
    payload = torch.zeros(len(parts[0]), -(-sum(sizes) // 8) * 8, dtype=torch.uint8, device=parts[0].device)
    end = 0
    for part, size in zip(parts, sizes, strict=True):
        payload[:, end : end + size].view(part.dtype).copy_(part)
        end += size
    return payload


def _whole(k: int, n: int, size: int) -> bool:
    """Whether k numbers of `size` bytes and their places take no fewer bytes than all n numbers."""
    return k * (size + 4) >= n * size


def _largest(sizes: torch.Tensor, k: int) -> torch.Tensor:
    """Places of the k largest. torch.topk is slow on many numbers (5 ms for a million), so a sample tells which numbers
    are surely too small, and only the rest is sorted. Where the sample was wrong, all are sorted."""
    step = 64
    share = k / step
    rank = math.ceil(share + 4 * math.sqrt(share) + 4)
    sample = sizes[::step]
    if 2 * rank < len(sample):
        bound = sample.topk(rank, sorted=False).values.amin()
        places = (sizes <= bound).logical_not_().nonzero().view(-1)  # NaN counts as large
        if len(places) >= k:
            return places[sizes[places].topk(k, sorted=False).indices]
    return sizes.topk(k, sorted=False).indices


@lru_cache(maxsize=8)
def _signs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256, 8]: the eight signs of a byte."""
    bits = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and_(1)
    return (2 * bits - 1).to(dtype).to(device)
