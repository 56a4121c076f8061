"""The flat map: all parameters are views of one flat vector, and all gradients are views of another.

Decayed tensors (two dimensions or more, embeddings included) come first, then the others, each in registration order.
Every tensor starts at a multiple of 64 bytes. Buckets are cut at the borders of tensors. The tensors of a bucket are
all decayed, except in the last one, which holds those that are not. Each bucket is padded to a multiple of `ranks` x 64
bytes, so a rank's pieces are its equal slice of *every* bucket. (With one contiguous shard for each rank, the
reduce-scatter of a bucket would be a reduce to one or two ranks.) Padding stays zero, and enters no norm and no
checkpoint.

Frozen parameters are left out, and so are tables, whose gradients travel as rows (tables.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hvdllm.tables import Table

ALIGN_BYTES = 64


class Span(NamedTuple):
    """A range of the flat vector, in elements. Weight decay applies to all of them or to none."""

    start: int
    stop: int
    decayed: bool


class TensorPart(NamedTuple):
    """A range of the elements of one tensor, without padding. `values` begin at element `start` of the tensor."""

    name: str
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together.

    Attributes:
        index: its number.
        span: its range, padding included.
        names: of its tensors, in the order of the vector.
    """

    index: int
    span: Span
    names: tuple[str, ...]


class Flat:
    """Makes a model's parameters and gradients views of flat vectors.

    Args:
        model: whose parameters have one dtype and device.
        ranks: each bucket is padded so that it can be cut into so many equal slices.
        bucket_bytes: a bucket ends at the first border between tensors at which it has at least so many bytes.
        copies: how many gradient vectors there are; 2 if an exchange keeps one in flight and calls `flip()`.
    """

    def __init__(self, model: nn.Module, ranks: int, bucket_bytes: float, copies: int = 1) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tables = {name: module for name, module in model.named_modules() if isinstance(module, Table)}
        first = next(iter(self.parameters.values()))
        align = ALIGN_BYTES // first.element_size()
        decayed = [name for name, p in self.parameters.items() if p.dim() >= 2]
        undecayed = [name for name, p in self.parameters.items() if p.dim() < 2]
        groups = [*((group, True) for group in self._groups(decayed, bucket_bytes)), (undecayed, False)]

        self.at: dict[str, slice] = {}  # the elements of each tensor, by its name
        self.buckets: list[Bucket] = []
        end = 0
        for names, decays in groups:
            if not names:
                continue
            start = end
            for name in names:
                self.at[name] = slice(end, end + self.parameters[name].numel())
                end = _up(end + self.parameters[name].numel(), align)
            end = start + _up(end - start, align * ranks)
            self.buckets.append(Bucket(len(self.buckets), Span(start, end, decays), tuple(names)))

        self.x = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.gradients = [torch.zeros_like(self.x) for _ in range(copies)]
        self._views = [[self.view(name, g) for name in self.parameters] for g in self.gradients]
        for name, p in self.parameters.items():
            self.view(name).copy_(p.detach())
            p.data = self.view(name)
        self.current = copies - 1  # number of the gradient vector that backward adds into
        self.flip()

    def _groups(self, names: list[str], bucket_bytes: float) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        size = 0
        for name in names:
            if size >= bucket_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += self.parameters[name].nbytes
        return groups

    def flip(self) -> None:
        """Makes the next gradient vector the current one, to which backward adds from here on."""
        self.current = (self.current + 1) % len(self.gradients)
        for p, view in zip(self.parameters.values(), self._views[self.current], strict=True):
            p.grad = view

    @property
    def g(self) -> torch.Tensor:
        """The current gradient vector, to which backward adds."""
        return self.gradients[self.current]

    def view(self, name: str, vector: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor's elements of a flat vector (by default that of the weights), in the shape of the tensor."""
        return (self.x if vector is None else vector)[self.at[name]].view(self.parameters[name].shape)

    def slices(self, index: int, of: int) -> list[Span]:
        """Slice number `index` of `of` equal ones of every bucket, one span for each bucket."""
        spans: list[Span] = []
        for bucket in self.buckets:
            start, stop, decayed = bucket.span
            share = (stop - start) // of
            spans.append(Span(start + share * index, start + share * (index + 1), decayed))
        return spans

    def pieces(self, index: int, of: int) -> list[Span]:
        """The elements of `slices` in as few spans as possible. Neighbours that decay alike are joined."""
        spans: list[Span] = []
        for span in self.slices(index, of):
            if spans and spans[-1].stop == span.start and spans[-1].decayed == span.decayed:
                span = Span(spans.pop().start, span.stop, span.decayed)
            spans.append(span)
        return spans

    def tensors(self) -> list[Span]:
        """One span for each tensor, in registration order, without padding."""
        return [Span(self.at[name].start, self.at[name].stop, p.dim() >= 2) for name, p in self.parameters.items()]

    def cut(self, spans: list[Span], vector: torch.Tensor) -> list[TensorPart]:
        """Cuts a vector into parts of named tensors.

        Args:
            spans: ranges of the flat vector.
            vector: the elements of these spans, one span after the other.
        """
        parts: list[TensorPart] = []
        offset = 0
        for span in spans:
            for name, place in self.at.items():
                start, stop = max(span.start, place.start), min(span.stop, place.stop)
                if start < stop:
                    values = vector[offset + start - span.start : offset + stop - span.start]
                    parts.append(TensorPart(name, start - place.start, values))
            offset += span.stop - span.start
        return parts

    def paste(self, parts: list[TensorPart], vector: torch.Tensor) -> None:
        """Writes parts of named tensors to their places in a vector over the whole map."""
        for name, start, values in parts:
            begin = self.at[name].start + start
            vector[begin : begin + values.numel()].copy_(values.reshape(-1))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
