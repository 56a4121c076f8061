"""The windows of a log as items of a task: those that are trained on, and those of each slice that are held out."""

from __future__ import annotations

import numpy as np
import torch

from hvdllm.errors import UserError
from hvdllm.online.log import Log
from hvdllm.online.rounds import Layout
from hvdllm.task.base import Source, Task

NEWEST, OLDER = 4, 8  # slices that are evaluated
OF_SLICE = "loss/slice-"  # and its number: the name of its loss in an evaluation


class LogItems:
    """The windows of a log, by number (rounds.py), as items of a task. Those behind its end cannot be taken.

    Args:
        log: of the stream.
        context: tokens in a window.
        token_bytes: of text that each token stands for, int64 [vocab].
    """

    name = "windows"

    def __init__(self, log: Log, context: int, token_bytes: np.ndarray) -> None:
        self.log, self.context, self.units, self._bytes = log, context, float(context), token_bytes

    def __len__(self) -> int:
        return max(0, self.log.last.tokens - 1) // self.context

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs and targets, each int64 [rows, context]. Raises UserError if the log holds tokens of another one."""
        picked = np.empty((len(rows), self.context + 1), np.int64)
        for i, row in enumerate(rows):
            picked[i] = self.log.tokens(int(row) * self.context, self.context + 1)
        if picked.max(initial=0) >= len(self._bytes):
            raise UserError(f"{self.log.folder} holds tokens that its tokenizer has not: copy the log again")
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(x)) for x in (picked[:, :-1], picked[:, 1:]))
        return inputs, targets, np.full(len(rows), self.context)

    def spelled(self, targets: torch.Tensor) -> int:
        """Bytes of text that targets on the CPU stand for."""
        return int(self._bytes[targets.numpy()].sum())

    def documents(self) -> np.ndarray:
        raise UserError("a stream is dealt to no clients: take another exchange than fedavg")

    def too_few(self, batch: int) -> str:
        return "nothing of the stream has arrived yet: look whether its source runs, or set eval_every=0"


class SliceItems:
    """The windows of a slice that are held out."""

    name = "windows"

    def __init__(self, items: LogItems, windows: np.ndarray) -> None:
        self._items, self._windows, self.units = items, windows, items.units

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        return self._items.take(self._windows[rows], epochs)

    def documents(self) -> np.ndarray:
        return self._windows

    def too_few(self, batch: int) -> str:
        return self._items.too_few(batch)


def shown(slices: int) -> list[int]:
    """The slices that are evaluated when so many are whole: the newest, and older ones at equal distances that grow by
    powers of two. A slice that is left out once is never evaluated again."""
    each = 1
    while slices > NEWEST and (slices - NEWEST) // each >= OLDER:
        each *= 2
    return [k for k in range(slices) if k >= slices - NEWEST or k % each == 0]


def slices_of(items: LogItems, layout: Layout, whole: int, task: Task) -> dict[str, Source]:
    """The held-out windows of slices as parts of an evaluation, if `whole` slices were trained past."""
    chosen = shown(whole)
    parts = [SliceItems(items, layout.held_out(k)) for k in chosen]
    return {f"slice-{k}": Source(task, each, 1 / len(chosen)) for k, each in zip(chosen, parts, strict=True)}
