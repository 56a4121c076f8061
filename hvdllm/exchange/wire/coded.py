"""Sums that travel coded: fp16, bf16, int8, top-k and sign are one mechanism with different codes.

    u_i = x_i + e_i                          # per rank, cut into the N ranks' pieces
    alltoall C(u_i); e_i = u_i - D(C(u_i))   # what the first rounding leaves stays with this rank
    y = sum_i D(C(u_i)) + e_own              # the owner of a piece, in rank order, in the gradients' dtype
    gather C(y); e_own = y - D(C(y))         # what the second leaves stays with the owner
    x = D(C(y))

Invariant: there are two roundings whatever N is, every rank decodes the same bytes, and nothing is lost: the sum of all
x, all e_i and e_own is the sum of all that came in (feedback.py says by which weights). `scatter` ends with y: there is
no second rounding and no e_own. The rank's own piece is coded like the others.

Bytes a rank: 2 (N-1)/N P b' with b' bytes an element, which is 0.50 (16 bit), 0.254 (int8) or 0.032 (sign) of fp32's.
Memory: the residual (P), that of the owner (P/N), and one chunk. Chunk k + 1 is encoded while chunk k travels. The sum
is exact, and takes the residuals along, where a rank is alone (N = 1), before `warmup_tokens`, and for vectors where
the code is too coarse for them.

More in hvdllm/exchange/wire/README.md, "The coded sum".
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, TypeVar

import torch

from hvdllm.errors import UserError
from hvdllm.exchange.wire import codecs
from hvdllm.exchange.wire import parts as wires
from hvdllm.exchange.wire.feedback import Feedback, Kept, Launch, of_bucket
from hvdllm.exchange.wire.plain import Spans, Work, scatter
from hvdllm.flat import Flat
from hvdllm.world.base import Flight, World

Chunk = tuple[slice, slice]  # a chunk of every piece: indices into rows of pieces
Index = tuple[torch.Tensor | slice, ...]
# Where no tensor of the model stands, for each chunk: indices into the rows of all pieces, and into rows of the own
# one.
Padding = list[tuple[Index, Index]]
UNIT = 4096  # the elements of a chunk are a multiple of this, so that they are whole blocks of every code
C = TypeVar("C", bound=wires.Coded)


class Coded(Feedback[C]):
    """coarse: the code is too coarse for vectors (biases, norms), whose bucket is therefore summed exactly."""

    coarse = False

    def __init__(self, world: World, settings: C, flat: Flat, nominal: int, spans: Spans | None = None) -> None:
        super().__init__(world, settings, flat, nominal, spans)
        self.padding: dict[int, Padding] = {}  # by bucket, for codes that would fill it

    @abstractmethod
    def code(self, committed: int) -> codecs.Codec | None:
        """The code of a round at so many committed tokens. None: the sum is exact."""

    def summing(self, key: str) -> Work:
        launch = self.launch(key)
        code = self._code(launch)
        if code is None:
            return lambda x: self.world.sum(self.spend(x, launch), launch.name).land()
        return lambda x: Travel(self, launch, code, x).sum()

    def scattering(self, key: str) -> Work:
        launch = self.launch(key)
        code = self._code(launch)
        if code is None:
            return lambda x: scatter(self.world, self.spend(x, launch), launch.name).land()
        return lambda x: Travel(self, launch, code, x).scatter()

    def feed(self, x: torch.Tensor, launch: Launch, part: Chunk) -> torch.Tensor:
        """What of x[part] is to be coded, before the residual is added."""
        return x[part]

    def sent(self, left: torch.Tensor, launch: Launch, part: Chunk) -> None:
        """left: what the first rounding has left out of that chunk."""

    def _code(self, launch: Launch) -> codecs.Codec | None:
        if self.world.size == 1 or (self.coarse and not launch.bucket.span.decayed):
            return None
        return self.code(launch.committed)


class Travel:
    """One sum on its way. x: [elements of the bucket], summed in place; rows: the same, with one row for the piece of
    each rank; chunks: of a piece."""

    def __init__(self, wire: Coded[Any], launch: Launch, code: codecs.Codec, x: torch.Tensor) -> None:
        self.wire, self.world, self.launch, self.x = wire, wire.world, launch, x
        self.code, self.back = code, code.back(wire.world.size)
        self.rows = x.view(self.world.size, -1)
        index = launch.bucket.index
        self.residual = of_bucket(wire.residual, index, x).view(self.rows.shape)
        length = self.rows.shape[1]
        count = max(1, round(x.nbytes / (wire.settings.chunk_mb * 2**20)))
        step = -(-length // (count * UNIT)) * UNIT
        self.chunks = [slice(start, min(start + step, length)) for start in range(0, length, step)]
        if code.keeps_zeros:
            self.padding = None
        else:
            self.padding = wire.padding.get(index) or wire.padding.setdefault(index, self._padding())

    def sum(self) -> torch.Tensor:
        owner = None
        if not self.back.exact:
            owner = of_bucket(self.wire.owner, self.launch.bucket.index, self.rows[0])
        there: list[Flight] = []
        home: list[Flight] = []
        for k in range(len(self.chunks) + 2):
            if k < len(self.chunks):
                there.append(self._send(k))
            if 0 < k <= len(self.chunks):
                home.append(self._answer(k - 1, self._add(k - 1, there.pop(0)), owner))
            if k > 1:
                self._receive(k - 2, home.pop(0))
        return self.x

    def scatter(self) -> torch.Tensor:
        there: list[Flight] = []
        sums: list[torch.Tensor] = []
        for k in range(len(self.chunks) + 1):
            if k < len(self.chunks):
                there.append(self._send(k))
            if k > 0:
                sums.append(self._add(k - 1, there.pop(0)))
        return torch.cat(sums)

    # ------------------------------------------------------------------ stages of chunk k
    def _send(self, k: int) -> Flight:
        part = (slice(None), self.chunks[k])
        left = self.residual[part]
        u = torch.add(self.wire.feed(self.rows, self.launch, part), left, alpha=self.launch.factor)
        payload = self.code.encode(u)
        decoded = self._decoded(self.code, payload, k, own=False)
        self.wire.sent(torch.sub(u, decoded, out=left if self.launch.factor else None), self.launch, part)
        return self.world.alltoall(payload, f"{self.launch.name}.out.{k}")

    def _add(self, k: int, flight: Flight) -> torch.Tensor:
        first: torch.Tensor
        first, *rest = self._decoded(self.code, flight.land(), k, own=True)
        for row in rest:
            first += row
        return first

    def _answer(self, k: int, y: torch.Tensor, owner: torch.Tensor | None) -> Flight:
        if owner is not None:
            y.add_(owner[self.chunks[k]], alpha=self.launch.factor)
        payload = self.back.encode(y.unsqueeze(0))
        if owner is not None and self.launch.factor:
            torch.sub(y, self._decoded(self.back, payload, k, own=True)[0], out=owner[self.chunks[k]])
        return self.world.gather(payload, f"{self.launch.name}.back.{k}", equal=True)

    def _receive(self, k: int, flight: Flight) -> None:
        self.rows[:, self.chunks[k]] = self._decoded(self.back, flight.land(), k, own=False)

    def _decoded(self, code: codecs.Codec, payload: torch.Tensor, k: int, own: bool) -> torch.Tensor:
        """own: all rows are of this rank's piece; otherwise row r is of piece r."""
        chunk = self.chunks[k]
        out = code.decode(payload, chunk.stop - chunk.start, self.x.dtype)
        if self.padding is not None:
            out[self.padding[k][own]] = 0
        return out

    def _padding(self) -> Padding:
        flat, rows = self.wire.flat, self.rows.shape
        empty = torch.ones(len(flat.x), dtype=torch.bool, device=flat.x.device)
        for place in flat.at.values():
            empty[place] = False
        empty = torch.cat([empty[span.start : span.stop] for span in self.wire.spans(self.launch.bucket)]).view(rows)
        own = empty[self.world.rank]
        return [
            (empty[:, chunk].nonzero(as_tuple=True), (slice(None), own[chunk].nonzero().view(-1)))
            for chunk in self.chunks
        ]


# ------------------------------------------------------------------ the wires
class Fp16Wire(Coded[wires.Fp16]):
    """Sums over tokens easily pass 65504, so they are scaled by 2^10 / nominal (rounded up to a power of two) in fp32
    before the cast. From mean gradients of 64 on they become infinite, and the run stops on the norm."""

    def code(self, committed: int) -> codecs.Codec:
        return codecs.CastCode(torch.float16, 2.0 ** (10 - math.ceil(math.log2(self.nominal))))


class Bf16Wire(Coded[wires.Bf16]):
    def code(self, committed: int) -> codecs.Codec:
        return codecs.CastCode(torch.bfloat16)


class Int8Wire(Coded[wires.Int8]):
    def code(self, committed: int) -> codecs.Codec:
        return codecs.Int8Code(self.settings.block)


class SignWire(Coded[wires.Sign]):
    coarse = rough = True

    def code(self, committed: int) -> codecs.Codec | None:
        return None if committed < self.settings.warmup_tokens else codecs.SignCode(self.settings.scale)


class TopKWire(Coded[wires.TopK]):
    """Deep Gradient Compression (Lin et al., 2018, arXiv 1712.01887) by pieces: the k largest of each piece and chunk.

    With momentum mu each rank chooses from its velocity: v_i = mu v_i + x_i; u_i = v_i + e_i. Where all of u_i was
    sent, v_i starts anew (factor masking). The velocity, P elements more, is one more summed vector; it is no residual,
    and its weight is never adapted. Vectors (biases, norms) travel whole, as the sum of velocities that are never
    masked; alone (N = 1) everything does. The sum of an owner has at most N k numbers, so its way back is exact.
    """

    coarse = rough = True

    def __init__(
        self, world: World, settings: wires.TopK, flat: Flat, nominal: int, spans: Spans | None = None
    ) -> None:
        super().__init__(world, settings, flat, nominal, spans)
        if not 0 < settings.density <= 1:
            raise UserError(f"wire.density={settings.density} must lie between 0 and 1")
        if settings.momentum >= 1:
            raise UserError(f"wire.momentum={settings.momentum} must be smaller than 1")
        self.velocity: Kept = {}

    def kept(self) -> dict[str, Kept]:
        return {**super().kept(), "velocity": self.velocity}

    def density(self, committed: int) -> float:
        """The warm-up has four equal parts. From one to the next the density falls by the same factor, from 25 %."""
        least = self.settings.density
        if committed >= self.settings.warmup_tokens:
            return least
        done = math.floor(4 * committed / self.settings.warmup_tokens) / 4
        return max(least, float(0.25 * (least / 0.25) ** done))

    def code(self, committed: int) -> codecs.Codec:
        return codecs.TopKCode(self.density(committed))

    def spend(self, x: torch.Tensor, launch: Launch) -> torch.Tensor:
        if self.settings.momentum:
            x.copy_(self._speed(x, launch).mul_(self.settings.momentum).add_(x))
        return super().spend(x, launch)

    def feed(self, x: torch.Tensor, launch: Launch, part: Chunk) -> torch.Tensor:
        if not self.settings.momentum:
            return x[part]
        return self._speed(x, launch)[part].mul_(self.settings.momentum).add_(x[part])

    def sent(self, left: torch.Tensor, launch: Launch, part: Chunk) -> None:
        if self.settings.momentum:
            self.velocity[launch.bucket.index].view(self.world.size, -1)[part].mul_(left != 0)

    def _speed(self, x: torch.Tensor, launch: Launch) -> torch.Tensor:
        return of_bucket(self.velocity, launch.bucket.index, x.view(-1)).view(x.shape)
