"""Embedding tables whose gradients are rows: a step touches few of them, so neither the rest travels nor is it updated.

A model marks a table by making it of the class `Table`. Its weights are then left out of the flat map (flat.py), they
need no gradient of their own size, and they have an optimizer of their own, which changes only the rows of a round.

Which rows a round has is never read by the host: sums have as many places as rows were taken, and those that are left
over add zeros to row 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-10  # added to the root of the sum of squares


class Table(nn.Module):
    """A table of rows; it maps numbers of rows, int64 [B], to rows, [B, width]. Its weights are not initialised.

    Row-wise Adagrad (Naumov et al., 2019, arXiv 1906.00091, as in FBGEMM): with the mean gradient g of a row,
    s += mean(g²), x -= lr g / (sqrt(s) + eps), where s is one number a row. Or plain descent: x -= lr g.

    Args:
        rows, width: the size.
        lr: the peak learning rate; that of a step follows the schedule of the run.
        adaptive: whether it is Adagrad, or plain descent.
    """

    def __init__(self, rows: int, width: int, lr: float, adaptive: bool) -> None:
        super().__init__()
        self.lr = lr
        self.weight = nn.Parameter(torch.empty(rows, width), requires_grad=False)
        self.squares: torch.Tensor | None
        self.register_buffer("squares", torch.zeros(rows) if adaptive else None, persistent=False)
        self._taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        values = F.embedding(rows, self.weight)
        if self.training and torch.is_grad_enabled():
            self._taken.append((rows, values.requires_grad_()))
        return values

    def gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The rows that forward has taken since the last call, int64 [B], and their gradients, [B, width]."""
        taken, self._taken = self._taken, []
        return [(rows, values.grad) for rows, values in taken if values.grad is not None]

    @torch.no_grad()
    def step(self, sums: RowSums, divisor: torch.Tensor, share: float, bad: torch.Tensor) -> None:
        """Makes one step of its optimizer in place, on the rows of a round.

        Args:
            sums: of their gradients.
            divisor: what sums are divided by, a scalar on the device.
            share: of the peak learning rate.
            bad: a scalar on the device; unless it is 0, nothing changes.
        """
        masked = bad.bool()
        mean = torch.where(masked, 0, sums.values / divisor.to(sums.values.dtype))
        # One place of a row at most adds something else than zeros, so the order of adding has no influence.
        if self.squares is not None:
            self.squares.index_add_(0, sums.rows, mean.square().mean(1))
            mean = mean / (self.squares[sums.rows].sqrt() + EPS)[:, None]
        self.weight.index_add_(0, sums.rows, mean, alpha=-share * self.lr)


@dataclass(frozen=True)
class RowSums:
    """The summed gradients of the rows of a table, each row once.

    Attributes:
        table: whose rows they are.
        rows: their numbers, int64 [places]; places that are left over have row 0.
        values: the sums, [places, width]; zeros in the places that are left over.
    """

    table: Table
    rows: torch.Tensor
    values: torch.Tensor


def summed(table: Table, rows: torch.Tensor, values: torch.Tensor) -> RowSums:
    """Adds up the gradients of equal rows, in the order in which they stand here. Bit-equal on all ranks that have the
    same rows and values, on GPUs too: nothing is added up atomically, and the host reads nothing.

    Args:
        table: whose rows they are.
        rows: int64 [places], in any order.
        values: their gradients, [places, width].
    """
    rows, order = torch.sort(rows, stable=True)
    segments = torch.zeros_like(rows)
    segments[1:] = (rows[1:] != rows[:-1]).cumsum(0)
    lengths = torch.zeros_like(rows).index_add_(0, segments, torch.ones_like(rows))  # integers, so exact in any order
    names = torch.zeros_like(rows).scatter_(0, segments, rows)  # the places of a segment all write the same
    added = torch.segment_reduce(values[order], "sum", lengths=lengths, axis=0, unsafe=True)
    return RowSums(table, names, added)
