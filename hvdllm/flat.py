"""The one map: all parameters are views of one flat vector, all gradients of another.

Layout: decayed tensors (two dimensions or more, embeddings included) first, then the rest, each in
registration order; every tensor starts at a multiple of 64 bytes. Buckets are cut at tensor borders, a bucket
is either all decayed or the undecayed one, and each is padded to a multiple of `ranks` x 64 bytes, so that a
rank's pieces are its equal slice of *every* bucket. (One contiguous shard a rank would make each bucket's
reduce-scatter a reduce to one or two ranks.) Padding stays zero: it enters no norm and no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

ALIGN_BYTES = 64


class Span(NamedTuple):
    """A range of the flat vector whose elements all decay, or all do not."""

    start: int
    stop: int
    decayed: bool


class Part(NamedTuple):
    """A range of one tensor, unpadded: `values` begin at its element `start`."""

    name: str
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Bucket:
    """Gradients that travel together."""

    index: int
    span: Span
    names: tuple[str, ...]


class Flat:
    """Re-points a model's parameters and gradients into flat vectors.

    model: its parameters must all have one dtype and device. ranks: the divisor that each bucket is padded
    for. bucket_bytes: a bucket closes at the first tensor border from here on. copies: gradient vectors, 2
    where an exchange keeps one in flight and `flip()` changes over.
    """

    def __init__(self, model: nn.Module, ranks: int, bucket_bytes: float, copies: int = 1) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = next(iter(self.parameters.values()))
        align = ALIGN_BYTES // first.element_size()
        decayed = [name for name, p in self.parameters.items() if p.dim() >= 2]
        undecayed = [name for name, p in self.parameters.items() if p.dim() < 2]
        groups = [*((group, True) for group in self._groups(decayed, bucket_bytes)), (undecayed, False)]

        self.at: dict[str, slice] = {}  # tensor -> its elements
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
        """The next gradient vector becomes the current one: backward adds into it from here on."""
        self.current = (self.current + 1) % len(self.gradients)
        for p, view in zip(self.parameters.values(), self._views[self.current], strict=True):
            p.grad = view

    @property
    def g(self) -> torch.Tensor:
        """The gradient vector that backward adds into."""
        return self.gradients[self.current]

    def view(self, name: str, vector: torch.Tensor | None = None) -> torch.Tensor:
        """This tensor's elements of a flat vector (the weights' by default), in the tensor's shape."""
        return (self.x if vector is None else vector)[self.at[name]].view(self.parameters[name].shape)

    def slices(self, index: int, of: int) -> list[Span]:
        """Piece `index` of `of` of every bucket, one span a bucket."""
        spans: list[Span] = []
        for bucket in self.buckets:
            start, stop, decayed = bucket.span
            share = (stop - start) // of
            spans.append(Span(start + share * index, start + share * (index + 1), decayed))
        return spans

    def pieces(self, index: int, of: int) -> list[Span]:
        """The same elements in as few spans as possible: neighbours that decay alike are joined."""
        spans: list[Span] = []
        for span in self.slices(index, of):
            if spans and spans[-1].stop == span.start and spans[-1].decayed == span.decayed:
                span = Span(spans.pop().start, span.stop, span.decayed)
            spans.append(span)
        return spans

    def tensors(self) -> list[Span]:
        """One span a tensor, in registration order, unpadded."""
        return [Span(self.at[name].start, self.at[name].stop, p.dim() >= 2) for name, p in self.parameters.items()]

    def cut(self, spans: list[Span], vector: torch.Tensor) -> list[Part]:
        """A vector over these spans (their elements one after the other) as parts of named tensors."""
        parts: list[Part] = []
        offset = 0
        for span in spans:
            for name, place in self.at.items():
                start, stop = max(span.start, place.start), min(span.stop, place.stop)
                if start < stop:
                    values = vector[offset + start - span.start : offset + stop - span.start]
                    parts.append(Part(name, start - place.start, values))
            offset += span.stop - span.start
        return parts

    def paste(self, parts: list[Part], vector: torch.Tensor) -> None:
        """The inverse of cut: writes parts of named tensors into a vector over the whole map."""
        for name, start, values in parts:
            begin = self.at[name].start + start
            vector[begin : begin + values.numel()].copy_(values.reshape(-1))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
