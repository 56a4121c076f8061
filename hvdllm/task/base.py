"""What a run trains on and for: the protocols of a task. The exchanges know nothing of it.

A task is a module (task/causal_lm.py and its neighbours) with the functions of `Kind`. It deals items, which are
windows, conversations, images or clicks, and counts units, which are what its loss is a sum over: targets of text,
images, clicks. Budget, batch and cadences count units, under names that end in `tokens` or `every` for every task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from hvdllm.plain import Json, Tree
from hvdllm.settings import Config
from hvdllm.world.base import World

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of the weights, by precision


class Items(Protocol):
    """A data set whose items can be taken in any order.

    Items that have an attribute `ragged` which is true are of unequal size. They are taken by micro-batches, so that
    each is padded by itself.
    """

    @property
    def name(self) -> str:
        """The items, in the plural."""

    @property
    def units(self) -> float:
        """How many units an item counts, in the mean over all of them."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[Tree, Tree, np.ndarray]:
        """Reads items. It is a pure function, and threads may call it.

        Args:
            rows: the numbers of the items, int64 [n].
            epochs: the epoch in which each is visited, int64 [n], which seeds what is random about it (masks,
              augmentation); None for an evaluation, which is the same each time.

        Returns inputs and targets, and the units that each item counts, int64 [n]. The first two are tensors on the CPU
        that have n items along dimension 0, or dicts, tuples or lists of such tensors. Targets that are negative
        integers do not count.
        """

    def documents(self) -> np.ndarray:
        """The number of the document that each item belongs to, int64 [items]. One client gets all of a document."""

    def too_few(self, batch: int) -> str:
        """The sentence for a data set that is smaller than a batch of so many items, or empty if `batch` is 0."""


class Task(Protocol):
    """What a run learns, as far as its model must know it. It can be kept in the run's folder."""

    @property
    def unit(self) -> str:
        """What is counted, in the plural: tokens, images or clicks."""

    @property
    def measures(self) -> int:
        """How many elements `measure` returns."""

    @property
    def files(self) -> dict[str, str]:
        """The files that `keep` writes, and their sha256."""

    def keep(self, folder: Path) -> None:
        """Writes what `restore` reads to the run's folder."""

    def build(self) -> nn.Module:
        """The model with weights drawn from the run's seed, on the CPU, in the dtype of its precision (DTYPES)."""

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""

    @property
    def frozen(self) -> int:
        """How many of them are not trained."""

    @property
    def tables(self) -> int:
        """How many of them are in tables whose gradients are rows (tables.py)."""

    @property
    def activations(self) -> int:
        """The bytes of activations that an item needs at least in training."""

    @property
    def flops(self) -> float:
        """The floating-point operations that training on one unit costs, as MFU counts them."""

    def loss(self, model: nn.Module, inputs: Tree, targets: Tree) -> torch.Tensor:
        """The SUM of the losses of all units in a micro-batch, in nats: a scalar on the model's device."""

    def measure(self, model: nn.Module, inputs: Tree, targets: Tree) -> torch.Tensor:
        """What an evaluation adds up: a vector whose first two elements are the summed loss and the units."""

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The results of an evaluation, by name, from the sums of `measure` over all items. `loss` is one of them."""

    def tell(self, metrics: dict[str, float]) -> str:
        """The results of an evaluation beside the loss, in words, such as `1.570 bits per byte`."""

    def sample(self, model: nn.Module, units: int) -> str:
        """A text that shows what the model can do. Equal weights and committed units give equal text."""


@dataclass(frozen=True)
class Source:
    """A part of the held-out data that is evaluated apart.

    Attributes:
        task: measures it.
        items: of it, not empty.
        share: of this part in the results of the whole.
    """

    task: Task
    items: Items
    share: float


@dataclass(frozen=True)
class Prepared:
    """A task and its data, open.

    Attributes:
        task: what is learnt.
        train, validation: the items; validation may be empty.
        data_hash: of the content, not of paths or times: equal on all machines with the same data.
        about: the data in a few words, for the header.
        notes: one sentence each, for a person.
        record: what the `run` record says of the data.
        sources: gives the parts of the held-out data that are evaluated apart, by name, the same on all ranks; None if
          it is one whole. There may be none yet.
    """

    task: Task
    train: Items
    validation: Items
    data_hash: str
    about: str
    notes: list[str] = field(default_factory=list)
    record: Json = field(default_factory=dict)
    sources: Callable[[World], dict[str, Source]] | None = None


class Kind(Protocol):
    """The functions of a task's module."""

    def prepare(self, config: Config, *, say: Callable[[str], None], whole: bool, wanted: str | None) -> Prepared:
        """Opens the data, and prepares it first if that is missing.

        Args:
            config: the settings of the run.
            say: gets a sentence before anything that takes time.
            whole: whether everything is checked. Only one rank of a host does this.
            wanted: the data hash of the run that goes on, or None.

        Raises UserError if the data cannot be used.
        """

    def restore(self, config: Config, folder: Path) -> Task:
        """The task that a run keeps in its folder, which may be a stranger's. Raises UserError if it cannot be read."""

    def rough(self, config: Config) -> Task | None:
        """A task whose model is no larger than the real one, before there is any data; None if nothing is known."""
