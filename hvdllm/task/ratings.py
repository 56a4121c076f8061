"""Whether a user clicks on an item: a two-tower recommender. Items and units are clicks, the rows of the data.

The clicks that come with hvdllm are drawn at known probabilities (task/clicks.py), so the least loss is known: their
entropy. The area under the ROC curve is computed from histograms of logits, which can be added up over ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hvdllm.models.gpt import Embedding
from hvdllm.models.size import pad_vocab
from hvdllm.models.towers import Towers, compile_towers, init_weights
from hvdllm.settings import Config
from hvdllm.tables import Table
from hvdllm.task import clicks, kept
from hvdllm.task.base import DTYPES, Prepared
from hvdllm.text.shards import data_folder

BINS, REACH = 1024, 16.0  # of the histograms of logits, between -REACH and REACH
MOST_ROWS = 2**31 - 65


class Clicks:
    """Rows of (user, item, label) that can be taken in any order.

    Args:
        rows: of clicks.ROW; they may be a memory map.
        what: names the data in a sentence.
    """

    name, units = "clicks", 1.0

    def __init__(self, rows: np.ndarray, what: str) -> None:
        self.rows, self.what = rows, what

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Pairs of user and item, int64 [rows, 2], and labels from 0 to 1, float32 [rows]."""
        chosen = self.rows[rows]
        pairs = np.stack([chosen["user"], chosen["item"]], axis=1).astype(np.int64)
        return (
            torch.from_numpy(pairs),
            torch.from_numpy(chosen["label"].astype(np.float32)),
            np.ones(len(rows), np.int64),
        )

    def documents(self) -> np.ndarray:
        """The clicks of a user belong together."""
        return np.asarray(self.rows["user"], np.int64)

    def too_few(self, batch: int) -> str:
        if not batch:
            return (
                f"no click of {self.what} is held out: raise task.validation_share, or switch evaluation off with "
                "eval_every=0"
            )
        return (
            f"{self.what} has {len(self)} clicks for training, fewer than the {batch} that one batch takes: give more, "
            "or lower batch_tokens"
        )


@dataclass(frozen=True)
class Recommender:
    """The task over some users and items. `ids` is a hash of their ids and rows."""

    config: Config
    users: int
    items: int
    ids: str

    unit, measures = "clicks", 3 + 2 * BINS

    @property
    def kept(self) -> str:
        """What the run's folder keeps, as JSON."""
        return json.dumps({"users": self.users, "items": self.items, "ids": self.ids})

    @property
    def files(self) -> dict[str, str]:
        return kept.digest(self.kept)

    def keep(self, folder: Path) -> None:
        kept.write(folder, self.kept)

    def _towers(self) -> Towers:
        task = self.config.task
        lr = 0.1 if task.table_lr is None else task.table_lr
        sparse = partial(Table, lr=lr, adaptive=task.table_optim == "adagrad")
        table = sparse if task.sparse else Embedding
        return Towers(self.config.model, pad_vocab(self.users), pad_vocab(self.items), table)

    def build(self) -> nn.Module:
        model = self._towers().to(DTYPES[self.config.precision])
        init_weights(model, self.config.seed)
        if self.config.model.compile:
            compile_towers(model)
        return model

    @cached_property
    def _shape(self) -> Towers:
        """The model without memory."""
        with torch.device("meta"):
            return self._towers()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._shape.parameters())

    @property
    def tables(self) -> int:
        rows = pad_vocab(self.users) + pad_vocab(self.items)
        return int(rows * self.config.model.width) if self.config.task.sparse else 0

    frozen = 0

    @property
    def activations(self) -> int:
        model = self.config.model
        return int(8 * (model.width + model.layers * (model.width + model.hidden)))

    @property
    def flops(self) -> float:
        """Of the towers; looking rows up and the dot product are next to nothing."""
        return float(
            6
            * sum(
                p.numel() for name, p in self._shape.named_parameters() if name.endswith(("up.weight", "down.weight"))
            )
        )

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(inputs)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")

    def measure(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss, the clicks, how many were told rightly, and histograms of the logits of those that were no
        clicks and of those that were."""
        logits, labels = model(inputs).double(), targets.double()
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        right = ((logits > 0) == (labels >= 0.5)).sum()
        places = ((logits / REACH + 1) * (BINS / 2)).nan_to_num(0).clamp(0, BINS - 1).long()
        histograms = [logits.new_zeros(BINS).index_add_(0, places, weight) for weight in (1 - labels, labels)]
        head = torch.stack([loss, torch.full_like(loss, len(labels)), right.double()])
        return torch.cat([head, *histograms])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean loss in nats a click, the share of clicks that were told rightly, and the area under the ROC curve
        (`auc`; left out where there are no clicks of both kinds)."""
        metrics = {"loss": sums[0] / sums[1], "accuracy": sums[2] / sums[1]}
        area = auc(np.array(sums[3 : 3 + BINS]), np.array(sums[3 + BINS :]))
        return metrics if area is None else {**metrics, "auc": area}

    def tell(self, metrics: dict[str, float]) -> str:
        area = f", AUC {metrics['auc']:.4f}" if "auc" in metrics else ""
        return f"{metrics['accuracy']:.1%} of the clicks right{area}"

    def sample(self, model: nn.Module, units: int) -> str:
        return ""


def auc(negative: np.ndarray, positive: np.ndarray) -> float | None:
    """The area under the ROC curve of two histograms over the same bins: the probability that a positive lies above a
    negative, where those of one bin count half. None if one of them is empty."""
    if not negative.sum() or not positive.sum():
        return None
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


def prepare(config: Config, *, say: Callable[[str], None], whole: bool, wanted: str | None) -> Prepared:
    settings = config.task
    if settings.path is None:
        table, name, what = clicks.draw(settings), "drawn clicks", "the set of drawn clicks"
    else:
        table = clicks.prepare(settings, data_folder(config.data_dir), say, whole)
        name, what = Path(settings.path).name, f"task.path={settings.path}"
    task = Recommender(config, table.users, table.items, table.ids)
    about = f"{name}, {len(table.train):,} for training, {table.users:,} users and {table.items:,} items"
    notes, record = [], dict[str, Any]()
    if table.least is not None:
        notes.append(
            f"the clicks are drawn at known probabilities: {table.least:.4f} nats a click, the mean entropy of those "
            "that are held out, is the least validation loss to be expected"
        )
        record["least_loss"] = table.least
    digest = kept.digest(f"{task.kept} {table.content}")[kept.NAME]
    return Prepared(task, Clicks(table.train, what), Clicks(table.validation, what), digest, about, notes, record)


def restore(config: Config, folder: Path) -> Recommender:
    def made(values: Any) -> Recommender | None:
        users, items, ids = values["users"], values["items"], values["ids"]
        sizes = all(type(size) is int and 1 <= size <= MOST_ROWS for size in (users, items))
        return Recommender(config, users, items, ids) if sizes and isinstance(ids, str) else None

    return kept.read(folder, made)


def rough(config: Config) -> Recommender:
    return Recommender(config, config.task.users or 1, config.task.items or 1, "")
