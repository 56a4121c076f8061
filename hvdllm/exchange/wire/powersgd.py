"""PowerSGD (Vogels et al., 2019, arXiv 1905.13727): each matrix travels as a product of two thin ones.

    M_i = g_i + e_i                       # [rows, columns], every tensor of two dimensions or more
    P = orth(sum_i M_i Q)                 # one sum for all matrices of a bucket, and for what is not compressed
    Q_i = M_i' P;  Q = sum_i Q_i          # one sum; Q is kept and is where the next round starts
    x = P Q';  e_i = M_i - P Q_i'

Invariant: x is the projection of sum_i M_i on the span of (sum_i M_i) Q, and exact where the rank of the sum is at most
r. Since x is linear in Q, x + sum_i e_i = sum_i M_i, and the residual needs no third sum. On a constant M the span
tends to the best one of rank r. All ranks orthogonalise the same numbers themselves, so that replicas are bit-equal on
equal processors.

A matrix that would shrink by less than min_compression travels as it is, and so does everything before warmup_tokens.
Bytes a rank: two sums of r (rows + columns) elements a matrix. State: the residual (P elements a rank) and Q, which is
equal on all ranks and comes from a fixed seed at first. The orthogonal factor is Householder's, so that a matrix that
is zero or of low rank does no harm.

More in hvdllm/exchange/wire/README.md, `powersgd`.
"""

from __future__ import annotations

import torch

from hvdllm.errors import UserError
from hvdllm.exchange.base import Spanned, Values
from hvdllm.exchange.wire import parts as wires
from hvdllm.exchange.wire.feedback import Feedback, Launched, of_bucket
from hvdllm.exchange.wire.plain import Spans, Work
from hvdllm.flat import Flat
from hvdllm.world.base import World


class PowerSGDWire(Feedback[wires.PowerSGD]):
    rough = True

    def __init__(
        self, world: World, settings: wires.PowerSGD, flat: Flat, nominal: int, spans: Spans | None = None
    ) -> None:
        if spans is not None:
            raise UserError("wire=powersgd needs whole matrices: set wire.hierarchical=false, or choose another wire")
        super().__init__(world, settings, flat, nominal)
        self.q: dict[str, torch.Tensor] = {}  # [columns, r] of each matrix that is compressed
        for index, (name, p) in enumerate(flat.parameters.items()):
            if p.dim() < 2:
                continue
            rows, columns = len(p), p.numel() // len(p)
            rank = min(settings.rank, rows, columns)
            if rows * columns >= settings.min_compression * rank * (rows + columns):
                start = torch.randn(columns, rank, generator=torch.Generator().manual_seed(index), dtype=flat.x.dtype)
                self.q[name] = start.to(flat.x.device)

    def summing(self, key: str) -> Work:
        launch = self.launch(key)
        thin = [name for name in launch.bucket.names if name in self.q]
        if self.world.size == 1 or not thin or launch.committed < self.settings.warmup_tokens:
            return lambda x: self.world.sum(self.spend(x, launch), f"{launch.name}.p").land()
        return lambda x: self._sum(x, launch, thin)

    def scattering(self, key: str) -> Work:
        raise UserError(
            "wire=powersgd needs whole matrices on every rank: use it with exchange=allreduce or delayed, or choose "
            "another wire"
        )

    def _sum(self, x: torch.Tensor, launch: Launched, thin: list[str]) -> torch.Tensor:
        residual = of_bucket(self.residual, launch.bucket.index, x)
        x.add_(residual, alpha=launch.factor)
        whole = [self._view(name, x, launch).view(-1) for name in launch.bucket.names if name not in self.q]
        matrices = [self._view(name, x, launch) for name in thin]

        p = _Joined([m @ self.q[name] for m, name in zip(matrices, thin, strict=True)] + whole)
        self.world.sum(p.vector, f"{launch.name}.p").land()
        spans = [torch.linalg.qr(part).Q for part in p.parts[: len(thin)]]
        q = _Joined([m.T @ span for m, span in zip(matrices, spans, strict=True)])
        mine = [part.clone() for part in q.parts]
        self.world.sum(q.vector, f"{launch.name}.q").land()

        residual = residual.zero_() if launch.factor else torch.zeros_like(x)  # a round without weight leaves nothing
        for m, name, span, own, total in zip(matrices, thin, spans, mine, q.parts, strict=True):
            torch.addmm(m, span, own.T, alpha=-1, out=self._view(name, residual, launch))
            torch.mm(span, total.T, out=m)
            self.q[name].copy_(total)  # in place: the first is the loop's memory, not to be freed on this stream
        for tensor, total in zip(whole, p.parts[len(thin) :], strict=True):
            tensor.copy_(total)
        return x

    def _view(self, name: str, x: torch.Tensor, launch: Launched) -> torch.Tensor:
        """A tensor's elements of a vector over the bucket, as a matrix."""
        place, start = self.flat.at[name], launch.bucket.span.start
        return x[place.start - start : place.stop - start].view(len(self.flat.parameters[name]), -1)

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> tuple[Values, dict[str, Spanned], dict[str, torch.Tensor]]:
        shared, summed, _ = super().state()
        return shared, summed, {f"q.{name}": q.clone() for name, q in self.q.items()}

    def load(self, shared: Values, summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        super().load(shared, summed, tensors)
        for name, q in self.q.items():
            q.copy_(tensors[f"q.{name}"])


class _Joined:
    """Copies of tensors, one after the other in one vector; parts: views of it in their shapes."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
        pieces = torch.split(self.vector, [tensor.numel() for tensor in tensors])
        self.parts = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
