"""The rows of tables (hvdllm/tables.py) that a round has touched, and how their gradients travel: rows, not tables.

Each rank hands all others the numbers and the gradients of the rows that its clicks touched, side by side in one tensor
of integers a table. Then every rank adds up equal rows, in rank order, so that all get the same sums, bit by bit. How
many rows there are is known on the host (one a click), so nothing waits for the device.

Bytes a rank and round: (N-1) x clicks of the rank x (1 + width) x 4 for each table, whatever its size; 8 in fp64. Rows
travel exactly, whatever the wire.
"""

from __future__ import annotations

import torch

from hvdllm.flat import Flat
from hvdllm.tables import RowSums, Table, summed
from hvdllm.world.base import Flight, World


class Rows:
    """The gradients of rows of one round, for an exchange whose replicas are whole. It does nothing without tables."""

    def __init__(self, flat: Flat, world: World) -> None:
        self.tables, self.world = flat.tables, world
        self._own: dict[str, list[torch.Tensor]] = {name: [] for name in flat.tables}
        self._flights: list[tuple[Table, Flight]] = []

    def take(self) -> None:
        """After a backward: takes the gradients of the rows of this micro-batch."""
        for name, table in self.tables.items():
            self._own[name] += [packed(rows, gradient) for rows, gradient in table.gradients()]

    def launch(self) -> None:
        """Hands out the rows of this rank's round."""
        for name, table in self.tables.items():
            weight = table.weight
            none = packed(torch.zeros(0, dtype=torch.int64, device=weight.device), weight[:0])
            own = torch.cat([none, *self._own[name]])
            self._own[name].clear()
            self._flights.append((table, self.world.gather(own, f"rows.{name}")))

    def land(self) -> list[RowSums]:
        """Waits for the rows of all ranks, and adds them up."""
        flights, self._flights = self._flights, []
        return [summed(table, *unpacked(flight.land(), table.weight.dtype)) for table, flight in flights]


def packed(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The numbers of rows beside the bits of their values, as integers of the values' size, [B, 1 + width]."""
    whole = torch.int32 if values.element_size() == 4 else torch.int64
    return torch.cat([rows.to(whole)[:, None], values.detach().contiguous().view(whole)], dim=1)


def unpacked(both: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `packed`: the numbers, int64 [B], and the values, [B, width]."""
    return both[:, 0].long(), both[:, 1:].contiguous().view(dtype)
