"""From what is read of a text to its tokens, a chunk at a time. Chunks are independent of each other.

So they can be encoded anywhere: in this process, or in others (text/workers.py). What comes back is put together in
order, and the result is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text import chat
from hvdllm.text.chat import BEGINS, COUNTS
from hvdllm.text.corpus import COPY, HELD_OUT, Raw, Rule, hash_of
from hvdllm.text.tokenize import Tokenizer

LOOKED = 2**20  # bytes of text on which a tokenizer of the user's is checked
Place = tuple[str, int]  # the name of a document, and the number of a piece in it


@dataclass(frozen=True)
class Chunk:
    """Some of what is read of a text."""

    raws: list[Raw]
    held_out: bool  # it is of text.validation

    @property
    def size(self) -> int:
        return sum(len(raw.data) for raw in self.raws)

    @property
    def at(self) -> int:
        """Bytes of all files that are read by its end."""
        return self.raws[-1].at


@dataclass
class Run:
    """The tokens of pieces that follow each other on a side, with the end tokens between their documents.

    Attributes:
        first, last: the first piece and the last one.
        ids: the tokens, little-endian, in the type of the shard.
        documents: how many documents there are, if one begins with the first piece.
        bytes: of the text as UTF-8; of conversations, those of the tokens that count.
        spelled: bytes that the tokens stand for.
    """

    first: Place
    last: Place
    ids: bytes
    documents: int
    bytes: int
    spelled: int


@dataclass
class Copies:
    """Documents that were left out because text.validation has them too. The names come in order."""

    first: str = ""
    last: str = ""
    count: int = 0

    def add(self, more: Copies) -> None:
        """Adds some that come next. A document in pieces counts once."""
        self.first = self.first or more.first
        self.count += more.count - (more.first == self.last)
        self.last = more.last

    def note(self) -> str:
        what = (
            f"{self.first} has" if self.count == 1 else f"{self.count} documents of text.path, first {self.first}, have"
        )
        return f"{what} text that text.validation has too; it was left out of the training text"


@dataclass
class Lost:
    """Checks whether a tokenizer of the user's keeps the text: LOOKED bytes are encoded and decoded again."""

    bytes: int = 0
    spelled: int = 0
    first: str | None = None

    def wants(self, tokenizer: Tokenizer) -> bool:
        return self.bytes <= LOOKED and not tokenizer.exact

    def look(self, tokenizer: Tokenizer, name: str, text: str, ids: np.ndarray) -> None:
        if not self.wants(tokenizer):
            return
        self.bytes += len(text.encode())
        self.spelled += int(tokenizer.token_bytes[ids].sum())
        if self.first is None and tokenizer.decode(ids).strip() != text.strip():
            self.first = name

    def note(self) -> str | None:
        if self.first is None:
            return None
        share = f"its tokens stand for {self.spelled / max(self.bytes, 1):.1%} of the bytes, and "
        return (
            f"the tokenizer loses or changes text: {share if self.spelled < self.bytes else ''}{self.first} does not "
            "come back as it was (letters that it does not know, lower case, a normal form?)"
        )


@dataclass
class Part:
    """What a chunk came to: a run for each side that it has pieces of, and the copies."""

    runs: dict[int, Run] = field(default_factory=dict)
    copies: Copies = field(default_factory=Copies)


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks.

    Attributes:
        rule: how lines are read, and on which side a piece is.
        tokenizer: of the text.
        template: of conversations: the user's tokenizer.json, or None, and text.template; None for other texts.
    """

    rule: Rule
    tokenizer: Tokenizer
    template: tuple[str | None, str] | None

    @property
    def dtype(self) -> np.dtype:
        """Of a shard."""
        return np.dtype(np.uint32 if self.rule.conversations else self.tokenizer.dtype).newbyteorder("<")

    def encode(self, chunk: Chunk, lost: Lost | None = None) -> Part:
        """The tokens of a chunk. Raises UserError if a line is not what it must be."""
        part = Part()
        found: list[tuple[int, Place, str]] = []
        for name, number, piece in (each for raw in chunk.raws for each in self.rule.pieces(raw)):
            side = HELD_OUT if chunk.held_out else self.rule.side(hash_of(piece))
            if side == COPY:
                part.copies.add(Copies(name, name, 1))
            else:
                found.append((side, (name, number), piece))
        if self.template is not None:
            self._converse(found, part)
            return part
        out: dict[int, list[np.ndarray]] = {}
        for (side, place, piece), ids in zip(found, self.tokenizer.encode([each[2] for each in found]), strict=True):
            size = len(piece.encode())
            spelled = size if self.tokenizer.exact else int(self.tokenizer.token_bytes[ids].sum())
            run = part.runs.setdefault(side, Run(place, place, b"", 0, 0, 0))
            if not run.documents or not joins(run.last, place):
                out.setdefault(side, []).extend([np.array([self.tokenizer.end])] * (run.documents > 0))
                run.documents += 1
            out[side].append(ids)
            run.last, run.bytes, run.spelled = place, run.bytes + size, run.spelled + spelled
            if lost is not None:
                lost.look(self.tokenizer, place[0], piece, ids)
        for side, parts in out.items():
            part.runs[side].ids = np.concatenate(parts).astype(self.dtype).tobytes()
        return part

    def _converse(self, found: list[tuple[int, Place, str]], part: Part) -> None:
        """Encodes conversations. Raises UserError if nothing of one counts."""
        assert self.template is not None
        path, asked = self.template
        template = chat.template(None if path is None else Path(path), asked)
        encoded = template.encode(self.tokenizer, [(name, json.loads(piece)) for _, (name, _), piece in found])
        for (side, place, _), (ids, counts) in zip(found, encoded, strict=True):
            if not counts[1:].any():
                raise UserError(f"{place[0]}: its template writes nothing that the assistant says, take the line out")
            flags = np.where(counts, COUNTS, np.uint32(0))
            flags[0] |= BEGINS
            spelled = int(self.tokenizer.token_bytes[ids[counts]].sum())
            run = part.runs.setdefault(side, Run(place, place, b"", 0, 0, 0))
            run.ids += (ids.astype(np.uint32) | flags).astype(self.dtype).tobytes()
            run.last, run.documents = place, run.documents + 1
            run.bytes, run.spelled = run.bytes + spelled, run.spelled + spelled

    def json(self) -> str:
        """What load() reads."""
        rule = asdict(self.rule) | {"apart": sorted(self.rule.apart), "others": sorted(self.rule.others)}
        return json.dumps([rule, self.tokenizer.json, self.tokenizer.ours, self.template])

    @staticmethod
    def load(text: str) -> Encoder:
        rule, described, ours, template = json.loads(text)
        tokenizer = Tokenizer(described)
        tokenizer.ours = ours
        apart, others = frozenset(rule.pop("apart")), frozenset(rule.pop("others"))
        return Encoder(Rule(**rule, apart=apart, others=others), tokenizer, template and tuple(template))


def joins(last: Place | None, place: Place) -> bool:
    """Whether a piece goes on with the document of the last one on its side, so that no end token stands between."""
    return last == (place[0], place[1] - 1)


def chunks(sides: list[tuple[bool, Iterable[Raw]]], size: int) -> Iterator[Chunk]:
    """What is read of each side, held out or not, in chunks of about `size` bytes."""
    for held_out, raws in sides:
        some: list[Raw] = []
        room = size
        for raw in raws:
            some.append(raw)
            room -= len(raw.data)
            if room <= 0:
                yield Chunk(some, held_out)
                some, room = [], size
        if some:
            yield Chunk(some, held_out)


def packed(part: Part) -> tuple[Json, list[bytes]]:
    """A part as JSON and bytes, for unpacked()."""
    heads = {str(side): asdict(run) | {"ids": len(run.ids)} for side, run in part.runs.items()}
    return {"runs": heads, "copies": asdict(part.copies)}, [run.ids for run in part.runs.values()]


def unpacked(head: Json, data: bytes) -> Part:
    part, at = Part(copies=Copies(**head["copies"])), 0
    for side, run in head["runs"].items():
        ids = data[at : at + run["ids"]]
        at += len(ids)
        part.runs[int(side)] = Run(**run | {"ids": ids, "first": tuple(run["first"]), "last": tuple(run["last"])})
    return part
