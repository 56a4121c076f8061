"""Conversations as items of a task: one each, cut at the context, with targets for what the assistant says."""

from __future__ import annotations

import numpy as np
import torch

from hvdllm.text.chat import BEGINS, COUNTS, IDS
from hvdllm.text.windows import SCAN


class Conversations:
    """The conversations of a text as items (task/base.py). Units are the targets that count.

    Inputs are padded on the right to the longest conversation of a micro-batch (`ragged`), with the end token and
    without targets. A causal model computes the same for what stands before. A conversation of which nothing counts
    once it is cut is left out.

    Args:
        tokens: uint32 [n] with flags, a memory map. All of them are looked at once, a part at a time.
        context: the most targets of a sequence.
        end: the token that pads.
        validation: whether this text is held out, for the sentence that says that it is too short.

    Attributes:
        cut: how many conversations are longer than the context.
        left_out: how many of these have nothing that counts.
    """

    name, ragged = "conversations", True

    def __init__(self, tokens: np.ndarray, context: int, end: int, validation: bool = False) -> None:
        self.tokens, self.context, self.end, self.validation = tokens, context, end, validation
        begins = _places(tokens, BEGINS)
        stops = np.append(begins[1:], len(tokens)) if len(begins) else begins
        self.cut = int((stops - begins > context + 1).sum())
        stops = np.minimum(stops, begins + context + 1)
        counts = _counted(tokens, begins + 1, stops)  # the first token is no target
        kept = counts > 0
        self.left_out = int((~kept).sum())
        self._begins, self._stops, self._counts = begins[kept], stops[kept], counts[kept]
        self.units = float(self._counts.mean()) if len(self) else 1.0

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs and targets, each int64 [rows, longest]; targets that do not count, and padding, are -1."""
        lengths = self._stops[rows] - self._begins[rows] - 1
        longest = int(lengths.max(initial=0))
        inputs = np.full((len(rows), longest), self.end, np.int64)
        targets = np.full((len(rows), longest), -1, np.int64)
        for i, row in enumerate(rows):
            found = self.tokens[self._begins[row] : self._stops[row]]
            ids, counts = (found & IDS).astype(np.int64), (found & COUNTS) > 0
            inputs[i, : lengths[i]] = ids[:-1]
            targets[i, : lengths[i]] = np.where(counts, ids, -1)[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets), self._counts[rows]

    def documents(self) -> np.ndarray:
        return np.arange(len(self))

    def too_few(self, batch: int) -> str:
        if self.validation:
            return (
                "no conversation is held out for validation: set text.validation, raise text.validation_share, or "
                "switch evaluation off with eval_every=0"
            )
        return (
            f"the training text has {len(self)} conversations that count {self.units:.0f} tokens each in the mean, "
            f"fewer than the {batch} that one batch takes: give more of them, or lower batch_tokens"
        )

    def notes(self) -> list[str]:
        """Sentences about what was cut and left out."""
        if not self.cut:
            return []
        side = "validation" if self.validation else "training"
        lost = f", {self.left_out:,} of them left out since nothing that counts remains" if self.left_out else ""
        return [f"{self.cut:,} {side} conversations are longer than model.context={self.context} and are cut{lost}"]


def _places(tokens: np.ndarray, flag: np.uint32) -> np.ndarray:
    """The places of tokens with a flag, int64 in ascending order."""
    parts = [np.flatnonzero(tokens[at : at + SCAN] & flag) + at for at in range(0, len(tokens), SCAN)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _counted(tokens: np.ndarray, firsts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """How many tokens count in each of these ranges, which are ascending and apart, int64 [ranges]."""
    counts = np.zeros(len(firsts), np.int64)
    for at in range(0, len(tokens), SCAN):
        before = np.concatenate([[0], np.cumsum((tokens[at : at + SCAN] & COUNTS) > 0)])
        some = slice(np.searchsorted(stops, at, "right"), np.searchsorted(firsts, at + SCAN))
        inside = [np.clip(edges[some] - at, 0, len(before) - 1) for edges in (firsts, stops)]
        counts[some] += before[np.maximum(*inside)] - before[inside[0]]
    return counts
