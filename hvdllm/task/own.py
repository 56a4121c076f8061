"""A model, a data set and a loss of the user's own, as a task; see hvdllm/session.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from hvdllm.errors import UserError
from hvdllm.plain import Tree
from hvdllm.settings import Config
from hvdllm.task.base import DTYPES, Prepared, Task

Loss = Callable[[nn.Module, Tree], torch.Tensor]


class Data(Protocol):
    """A map-style data set: items by number, which are tensors, numbers, or dicts, tuples or lists of these."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Tree: ...


@dataclass(frozen=True)
class OwnItems:
    """The items of a data set.

    Attributes:
        data: the data set.
        count: how many units an item counts.
        units: the mean of that over all items, as the user knows it.
        collate: makes one batch of a list of items.
    """

    data: Data
    count: Callable[[Tree], int] | None
    units: float
    collate: Callable[[list[Tree]], Tree] = default_collate

    name = "items"

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[Tree, Tree, np.ndarray]:
        items = [self.data[int(row)] for row in rows]
        counts = [1] * len(items) if self.count is None else [int(self.count(item)) for item in items]
        return self.collate(items), None, np.array(counts, np.int64)

    def documents(self) -> np.ndarray:
        return np.arange(len(self))

    def too_few(self, batch: int) -> str:
        if not batch:
            return "Session has no data to evaluate on: give validation=, or eval_every=0"
        return f"Session: data has {len(self)} items, fewer than the {batch} that one batch takes: give batch= less"


@dataclass(frozen=True)
class OwnTask:
    """What Session was given: the model, the user's loss and metrics, and what is counted."""

    config: Config
    model: nn.Module
    sum: Loss
    unit: str
    more: Mapping[str, Loss]

    @property
    def measures(self) -> int:
        return 2 + len(self.more)

    @property
    def files(self) -> dict[str, str]:
        return {}

    def keep(self, folder: Path) -> None:
        """Nothing: the user's script is needed to load the weights."""

    def build(self) -> nn.Module:
        return self.model.to(DTYPES[self.config.precision])

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def frozen(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if not p.requires_grad)

    tables = 0

    @property
    def activations(self) -> int:
        return 0

    @property
    def flops(self) -> float:
        """Not known, so no MFU is said."""
        return 0.0

    def loss(self, model: nn.Module, inputs: Tree, targets: Tree) -> torch.Tensor:
        loss = self.sum(model, inputs)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            raise UserError(
                f"Session: loss returned {type(loss).__name__}"
                f"{f' of shape {list(loss.shape)}' if isinstance(loss, torch.Tensor) else ''}: it must be the SUM of "
                "the losses of the batch, one number"
            )
        return loss

    def measure(self, model: nn.Module, inputs: Tree, targets: Tree) -> torch.Tensor:
        """The summed loss, the units, and the sums of the user's metrics. `targets` are the counts of units."""
        sums = [self.loss(model, inputs, None).double(), targets.sum().double()]
        sums += [torch.as_tensor(metric(model, inputs)).double().reshape(()) for metric in self.more.values()]
        return torch.stack([x.to(sums[0].device) for x in sums])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean loss a unit, and the user's metrics divided by the units."""
        return {"loss": sums[0] / sums[1]} | {
            name: value / sums[1] for name, value in zip(self.more, sums[2:], strict=True)
        }

    def tell(self, metrics: dict[str, float]) -> str:
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in self.more)

    def sample(self, model: nn.Module, units: int) -> str:
        return ""


class Held(OwnItems):
    """The items to evaluate on. Their targets are the units that each counts."""

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[Tree, Tree, np.ndarray]:
        inputs, _, counts = super().take(rows, epochs)
        return inputs, torch.from_numpy(counts), counts


@dataclass(frozen=True)
class OwnKind:
    """The functions of the task (task/base.py, Kind) over what Session was given."""

    task: OwnTask
    train: OwnItems
    validation: OwnItems
    identity: str

    def prepare(self, config: Config, *, say: Callable[[str], None], whole: bool, wanted: str | None) -> Prepared:
        digest = hashlib.sha256(f"{len(self.train)} {len(self.validation)} {self.identity}".encode()).hexdigest()
        about = f"{len(self.train):,} items of your own"
        return Prepared(self.task, self.train, self.validation, digest, about)

    def restore(self, config: Config, folder: Path) -> Task:
        return self.task

    def rough(self, config: Config) -> Task | None:
        return None
