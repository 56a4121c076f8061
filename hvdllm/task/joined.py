"""Several data sets as one: one after the other, or mixed in shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hvdllm.order.mixture import Mixture
from hvdllm.task.base import Items


class Joined:
    """The items of several data sets, whose inputs and targets are sequences of tokens, one data set after the other.

    With `shares` they are mixed (order/mixture.py), so that each data set provides its share of the units. Otherwise
    each item is visited once an epoch.

    Args:
        parts: the data sets, which are not empty if there are shares.
        pad: the token that sequences are filled up with, on the right, where some are longer than others.
        shares: of the units, for each part. They add up to 1.
    """

    def __init__(self, parts: Sequence[Items], pad: int, shares: Sequence[float] | None = None) -> None:
        self.parts, self.pad, self.shares = parts, pad, shares
        self.name = parts[0].name if len({part.name for part in parts}) == 1 else "items"
        self.ragged = any(getattr(part, "ragged", False) for part in parts)
        self._first = np.cumsum([0, *map(len, parts)])  # the number of each part's first item, and of all
        if shares is None:
            counts = [float(len(part)) for part in parts]
        else:
            counts = [share / part.units for share, part in zip(shares, parts, strict=True)]
        whole = sum(counts)
        self._counts = [count / whole for count in counts] if whole else counts  # shares of the items
        self.units = sum(count * part.units for count, part in zip(self._counts, parts, strict=True)) or parts[0].units

    def __len__(self) -> int:
        return int(self._first[-1])

    def order(self, seed: int) -> Mixture | None:
        """The order of the items, or None if each is visited once an epoch."""
        if self.shares is None:
            return None
        return Mixture([len(part) for part in self.parts], self._counts, seed)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs and targets, each int64 [rows, longest]; targets that do not count are negative."""
        owners = np.searchsorted(self._first, rows, side="right") - 1
        units, taken = np.empty(len(rows), np.int64), list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            some = None if epochs is None else epochs[places]
            x, y, units[places] = self.parts[owner].take(rows[places] - self._first[owner], some)
            taken.append((torch.from_numpy(places), x, y))
        longest = max((x.shape[1] for _, x, _ in taken), default=0)
        inputs = torch.full((len(rows), longest), self.pad)
        targets = torch.full((len(rows), longest), -1)
        for at, x, y in taken:
            inputs[at, : x.shape[1]], targets[at, : y.shape[1]] = x, y
        return inputs, targets, units

    def documents(self) -> np.ndarray:
        """The document of each item. Each data set begins a new one."""
        out, before = [np.empty(0, np.int64)], 0
        for part in self.parts:
            own = part.documents()
            out.append(own + before)
            before += int(own.max(initial=-1)) + 1
        return np.concatenate(out)

    def too_few(self, batch: int) -> str:
        if not batch or len(self.parts) == 1:
            return self.parts[0].too_few(batch)
        return (
            f"the training texts have {len(self)} {self.name} together, fewer than the {batch} that one batch takes: "
            "give more text, or lower batch_tokens or model.context"
        )


def by_share(parts: Mapping[str, Items], shares: Mapping[str, float] | None) -> dict[str, float]:
    """The shares of those parts that are not empty, which add up to 1. Without shares, by how many units each has."""
    found = {
        name: len(part) * part.units if shares is None else shares[name] for name, part in parts.items() if len(part)
    }
    whole = sum(found.values())
    return {name: share / whole for name, share in found.items()}
