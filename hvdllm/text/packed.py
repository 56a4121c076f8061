"""Whole documents packed into windows, so that little of a window is padding and no document is cut for another.

A document is learnt as `end, t1 ... tn` with the targets `t1 ... tn, end`. One with more targets than a window has
places is cut into windows of its own, and what remains is packed like a short one. Where it goes on, the end token
stands before the token that is read next, and has no target: the end token is where attention begins anew
(model.documents). So each token of a document is a target exactly once.

Which pieces share a window is found by best-fit decreasing (Johnson, 1973), BUFFER pieces at a time, in the order of
the text. It is a pure function of the tokens and the context.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hvdllm.text import overlap
from hvdllm.text.windows import SCAN

BUFFER = 2**14  # pieces that are packed together


class Packed:
    """The packed windows of a text as items of a task (task/base.py). Units are the targets that count.

    Inputs are padded on the right with end tokens, each of which is a document of its own, without a target.

    Args:
        tokens: the text, unsigned [n]; all of it is read once for its end tokens. 30 bytes for each piece are kept.
        context: places of a window, at least 2.
        end: the token between documents.
        validation: whether this text is held out, for the sentence that says that it is too short.

    Attributes:
        padding: the share of all places that have no target.
        alone: the same if each piece had a window of its own.
    """

    name = "windows"

    def __init__(self, tokens: np.ndarray, context: int, end: int, validation: bool = False) -> None:
        self.tokens, self.context, self.end, self.validation = tokens, context, end, validation
        rows = [np.empty((0, 3), np.int64)]
        windows = [np.empty(0, np.int64)]
        count = 0
        for some in _buffers(_pieces(tokens, end, context)):
            places = some[:, 1] - some[:, 0] + some[:, 2]
            owner, opened = packed(places, context)
            order = np.argsort(owner, kind="stable")
            rows.append(some[order])
            windows.append(owner[order] + count)
            count += opened
        self._pieces = np.concatenate(rows)  # first target, behind the last one, and whether it goes on
        owners = np.concatenate(windows)
        self._begins = np.searchsorted(owners, np.arange(count + 1))  # of each window among the pieces
        targets = self._pieces[:, 1] - self._pieces[:, 0]
        self._counts = np.diff(np.concatenate([[0], np.cumsum(targets)])[self._begins])
        self.units = float(self._counts.mean()) if count else 1.0
        self.padding = 1 - self.units / context if count else 0.0
        self.alone = 1 - float(targets.mean()) / context if count else 0.0

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs and targets, each int64 [rows, context]; places without a target are -1."""
        inputs = np.full((len(rows), self.context), self.end, np.int64)
        targets = np.full((len(rows), self.context), -1, np.int64)
        for i, row in enumerate(rows):
            at = 0
            for first, stop, goes_on in self._pieces[self._begins[row] : self._begins[row + 1]]:
                size = stop - first
                read = self.tokens[first - goes_on : stop - 1]  # what is read after the end token
                inputs[i, at + 1 : at + 1 + len(read)] = read
                known = self.tokens[first:stop]
                targets[i, at + goes_on : at + goes_on + size] = self.end  # the text may end without one
                targets[i, at + goes_on : at + goes_on + len(known)] = known
                at += size + goes_on
        return torch.from_numpy(inputs), torch.from_numpy(targets), self._counts[rows]

    def documents(self) -> np.ndarray:
        return np.arange(len(self))

    def too_few(self, batch: int) -> str:
        if self.validation:
            return (
                "no document is held out for validation: set text.validation, raise text.validation_share, or switch "
                "evaluation off with eval_every=0"
            )
        return (
            f"the training text fills {len(self)} windows of model.context={self.context} tokens, fewer than the "
            f"{batch} that one batch takes: give more text, or lower batch_tokens or model.context"
        )

    def notes(self) -> list[str]:
        """A sentence about what was packed."""
        if self.validation or not len(self):
            return []
        return [
            f"{len(self):,} windows of {self.context} tokens are packed with whole documents, {self.padding:.1%} of "
            f"them padding; one document in a window would make it {self.alone:.1%}"
        ]

    def repeated(self, seen: np.ndarray | None, eval_tokens: int) -> float | None:
        """The share of evaluated windows with overlap.RUN tokens in a row that the training text has too.

        Args:
            seen: what overlap.repeated() returned for this text, or None if that is not known.
            eval_tokens: the setting, 0 for all.
        """
        windows = min(len(self), max(1, int(eval_tokens // self.units))) if eval_tokens else len(self)
        if seen is None or not windows:
            return None
        sums = np.concatenate([[0], np.cumsum(seen)])
        first, stop, goes_on = self._pieces[: self._begins[windows]].T
        first = (first - goes_on).clip(max=len(seen))
        last = np.maximum(first, (stop - overlap.RUN + 1).clip(max=len(seen)))
        hits = np.concatenate([[0], np.cumsum(sums[last] > sums[first])])[self._begins[: windows + 1]]
        return float((np.diff(hits) > 0).mean())


def packed(places: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the window of each piece, int64 [pieces], and how many windows there are.

    Args:
        places: that each piece takes, int64 [pieces], at most `context`.
        context: places of a window.
    """
    owner = np.empty(len(places), np.int64)
    room: list[list[int]] = [[] for _ in range(context + 1)]  # windows by the places that are left
    free = np.zeros(context + 1, bool)  # whether there are any
    windows = 0
    for piece in np.argsort(-places, kind="stable").tolist():
        size = int(places[piece])
        left = size + int(free[size:].argmax())
        if free[left]:
            window = room[left].pop()
            free[left] = bool(room[left])
        else:
            window, left, windows = windows, context, windows + 1
        owner[piece] = window
        if left > size:
            room[left - size].append(window)
            free[left - size] = True
    return owner, windows


def _pieces(tokens: np.ndarray, end: int, context: int) -> Iterator[np.ndarray]:
    """The pieces of all documents in order, int64 [pieces, 3], in blocks: as Packed._pieces. The end is a target."""
    first = 0
    for at in range(0, len(tokens), SCAN):
        ends = np.flatnonzero(tokens[at : at + SCAN] == end) + at
        if at + SCAN >= len(tokens) and (not len(ends) or ends[-1] < len(tokens) - 1):
            ends = np.append(ends, len(tokens))  # where the text ends, the end token of the last document would stand
        begins = np.concatenate([[first], ends[:-1] + 1])[: len(ends)]
        first = int(ends[-1]) + 1 if len(ends) else first
        stops = ends + 1
        kept = stops - begins > 1  # an empty document has nothing to learn
        begins, stops = begins[kept], stops[kept]
        more = np.maximum(0, -(-(stops - begins - context) // (context - 1)))  # pieces after the first
        number = np.arange(int(more.sum() + len(more))) - np.repeat(np.cumsum(more + 1) - more - 1, more + 1)
        begins, stops = np.repeat(begins, more + 1), np.repeat(stops, more + 1)
        starts = begins + np.where(number > 0, context + (number - 1) * (context - 1), 0)
        goes_on = (number > 0).astype(np.int64)
        yield np.stack([starts, np.minimum(stops, starts + context - goes_on), goes_on], 1)


def _buffers(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same pieces, BUFFER at a time, whatever the blocks are."""
    rest = np.empty((0, 3), np.int64)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) >= BUFFER:
            yield rest[:BUFFER]
            rest = rest[BUFFER:]
    if len(rest):
        yield rest
