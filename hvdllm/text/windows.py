"""The windows of a text: context + 1 consecutive tokens each, which begin `context` tokens apart."""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

SCAN = 2**24  # tokens that are searched for the ends of documents at a time


class Windows:
    """A text as items of a task (task/base.py): W = (tokens - 1) // context windows, each with `context` targets.

    Args:
        tokens: the text, unsigned [n]; nothing of it is read before it is needed.
        context: tokens in a sequence.
        end: the token between documents; None if the text is one document.
        validation: whether this text is held out, for the sentence that says that it is too short.
        without: spans of tokens, int64 [spans, 2]; windows that hold one of these tokens are left out. None: no span.
    """

    name = "windows"

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        end: int | None = None,
        validation: bool = False,
        without: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.context, self.end, self.validation = tokens, context, end, validation
        self.units = float(context)
        self._windows = sliding_window_view(tokens, context + 1)[::context] if len(tokens) > context else tokens[:0]
        self.whole = max(0, (len(tokens) - 1) // context)  # how many windows there are before some are left out
        self._kept = None if without is None or not len(without) else _kept(without, context, self.whole)

    def __len__(self) -> int:
        return self.whole if self._kept is None else len(self._kept)

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """The windows that items are."""
        return rows if self._kept is None else self._kept[rows]

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs and targets, each contiguous int64 [rows, context]; the targets are the inputs one token later."""
        picked = self._windows[self._numbers(rows)].astype(np.int64)
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(x)) for x in (picked[:, :-1], picked[:, 1:]))
        return inputs, targets, np.full(len(rows), self.context)

    def documents(self) -> np.ndarray:
        """The document in which each window begins. An end token belongs to the document before it."""
        return np.searchsorted(_ends(self.tokens, self.end), self._numbers(np.arange(len(self))) * self.context)

    def too_few(self, batch: int) -> str:
        return _too_few(len(self.tokens), len(self), self.context, batch, self.validation)


def _kept(without: np.ndarray, context: int, windows: int) -> np.ndarray:
    """The windows that hold no token of these spans, int64 in ascending order. A window holds its last target too."""
    change = np.zeros(windows + 1, np.int64)
    first = np.maximum(0, -(-(without[:, 0] - context) // context))
    np.add.at(change, first.clip(max=windows), 1)
    np.add.at(change, ((without[:, 1] - 1) // context + 1).clip(max=windows), -1)
    return np.flatnonzero(np.cumsum(change[:windows]) == 0)


def _ends(tokens: np.ndarray, end: int | None) -> np.ndarray:
    """The places of the end tokens, in ascending order."""
    if end is None:
        return np.empty(0, np.int64)
    parts = [np.flatnonzero(tokens[at : at + SCAN] == end) + at for at in range(0, len(tokens), SCAN)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _too_few(tokens: int, windows: int, context: int, batch: int, validation: bool) -> str:
    """The sentence for a text that is too short."""
    if validation:
        return (
            f"the validation text has {tokens} tokens, less than one window of model.context={context} and 1: set "
            "text.validation, raise text.validation_share, or switch evaluation off with eval_every=0"
        )
    return (
        f"the training text has {windows} windows of model.context={context} tokens, fewer than the {batch} that one "
        "batch takes: give more text, or lower batch_tokens or model.context"
    )
