"""Texts that somebody else has turned into tokens: files of Megatron-LM, of llm.c and of NumPy, read where they are.

    .npy           a vector of integers
    .bin + .idx    Megatron-LM's indexed data set, version 1; the documents are the sequences of the index
    .bin           llm.c's: 256 numbers of 4 bytes, of which the first are 20240520 (ids of 2 bytes) or 20240801 (ids of
                   4 bytes), 1, and how many tokens there are; then the tokens

Nothing is copied. Each file is read once, for its sum and its largest id, and what was found is kept in `data_dir`
under the file's path, size and time of change.

A document stands between two end tokens, or is an entry of Megatron's index. Those of the training text that are held
out too, token by token, are left out of it. They are found by hashes, and kept in `data_dir` under the sums. In memory
are the hashes of the held-out documents, about 100 bytes each, and a block of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.text import overlap
from hvdllm.text.corpus import resolve
from hvdllm.text.kept import keep, kept
from hvdllm.text.parts import Text, Tokens
from hvdllm.text.tokenize import BYTES, Tokenizer

ENDINGS = (".npy", ".bin")
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # its codes of dtypes
LLM_C = {20240520: np.uint16, 20240801: np.uint32}
LLM_C_HEAD = 256  # numbers of 4 bytes
BLOCK = 2**24  # tokens that are looked at together
NEAR = 2**22  # tokens within which the border of a document is looked for where the held-out text begins
LONGEST_LOOK = 2**31  # training tokens in which repeated runs are looked for, 25 M a second on two cores


def files(text: Tokens) -> list[Path]:
    """The files of tokens that text.path names."""
    if text.path is None:
        raise UserError(
            "text=tokens reads the files that text.path names: give a .npy or .bin file, a folder or a glob"
        )
    return resolve(text.path, "text.path", ENDINGS)


def tokenizer_of(text: Text) -> Tokenizer:
    """The tokenizer that text.tokenizer names: bytes, or a file."""
    return Tokenizer(BYTES) if text.tokenizer == "bytes" else Tokenizer.load(Path(text.tokenizer).expanduser())


def opened(path: Path) -> np.ndarray:
    """The tokens of a file as a memory map, integers [n]. Raises UserError if it is none of the three formats."""
    try:
        with untrusted.opened(path) as file:
            head = file.read(4 * LLM_C_HEAD)
        if head.startswith(b"\x93NUMPY"):
            found: np.ndarray = np.load(path, mmap_mode="r")
        elif path.with_suffix(".idx").exists():
            found = np.memmap(path, megatron_type(path.with_suffix(".idx")), "r")
        else:
            numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
            if len(numbers) < LLM_C_HEAD or int(numbers[0]) not in LLM_C or numbers[1] != 1:
                raise UserError(
                    f"{path} holds no tokens: it is no .npy file, has no .idx file of Megatron-LM beside it, and does "
                    "not begin as a file of llm.c does"
                )
            found = np.memmap(path, LLM_C[int(numbers[0])], "r", 4 * LLM_C_HEAD)
            if len(found) != numbers[2]:
                raise UserError(f"{path} has {len(found):,} tokens and its head says {numbers[2]:,}: copy it again")
    except (OSError, ValueError) as error:  # Unfit is a ValueError, and NumPy raises them for heads that are none
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): give a file of tokens") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"{path} holds {found.dtype} of shape {list(found.shape)}: tokens are a vector of integers")
    return found


def megatron_type(index: Path) -> np.dtype[Any]:
    """The type of the tokens beside an index of Megatron-LM. Raises Unfit or UserError if it is none."""
    with untrusted.opened(index) as file:
        head = file.read(18)
    kind = head[17] if len(head) == 18 else 0
    if not head.startswith(MEGATRON) or int.from_bytes(head[9:17], "little") != 1 or kind not in MEGATRON_TYPES:
        raise UserError(f"{index} is no index of Megatron-LM, version 1, with integers: give its .idx and .bin files")
    return np.dtype(MEGATRON_TYPES[kind])


def megatron_starts(index: Path, itemsize: int) -> np.ndarray:
    """The tokens at which the entries of an index begin, int64 in ascending order. Raises UserError if it is cut short.

    Args:
        index: the file, whose head megatron_type() has checked.
        itemsize: bytes of a token.
    """
    try:
        with untrusted.opened(index) as file:
            file.seek(18)
            count = int.from_bytes(file.read(8), "little")
            if os.fstat(file.fileno()).st_size < 34 + 12 * count:
                raise UserError(f"{index} promises {count:,} entries and ends before: copy it again")
            file.seek(34 + 4 * count)
            return np.unique(np.fromfile(file, "<i8", count) // itemsize)
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"{index} cannot be read ({error}): give the .idx file beside its .bin file") from None


def looked_at(path: Path, tokens: np.ndarray, data_dir: Path, say: Callable[[str], None]) -> tuple[str, int]:
    """The sha256 of a file's tokens, and its largest id. Raises UserError if an id is negative."""
    stat = os.stat(path)
    key = hashlib.sha256(f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    known = data_dir / "tokens" / f"{key.hexdigest()}.json"
    if {"sha256", "most"} <= (before := kept(known, 4096)).keys():
        return str(before["sha256"]), int(before["most"])
    if len(tokens) > BLOCK:
        say(f"reading {path} once, {tokens.nbytes / 2**30:.1f} GiB, for its sum")
    digest, least, most = hashlib.sha256(str(tokens.dtype).encode()), 0, 0
    for at in range(0, len(tokens), BLOCK):
        block = np.ascontiguousarray(tokens[at : at + BLOCK])
        digest.update(block.data)
        least, most = min(least, int(block.min())), max(most, int(block.max()))
    if least < 0:
        raise UserError(f"{path} holds the number {least}, which is no token: give a file of tokens")
    found = digest.hexdigest(), most
    keep(known, json.dumps({"sha256": found[0], "most": found[1]}).encode())
    return found


@dataclass(frozen=True)
class Split:
    """Tokens in two sides.

    Attributes:
        train, held: a part a file.
        left_out: of each part of `train`, the documents that are held out too, int64 [documents, 2].
        seen: of each part of `held`, which runs `train` has without them (overlap.repeated), bool [places]; a part may
          have none. None if the training text is too long to look.
        data_hash: of all of this and of the tokenizer.
    """

    train: list[np.ndarray]
    held: list[np.ndarray]
    left_out: list[np.ndarray]
    seen: list[np.ndarray] | None
    data_hash: str

    def repeated(self, context: int, eval_tokens: int) -> float | None:
        """As Corpus.repeated, over the windows of all parts."""
        windows = [max(0, (len(each) - 1) // context) for each in self.held]
        left = min(sum(windows), max(1, eval_tokens // context)) if eval_tokens else sum(windows)
        if self.seen is None or not left:
            return None
        total, hits = left, 0.0
        for seen, count in zip(self.seen, windows, strict=True):
            some = min(count, left)
            hits += overlap.share(seen, context, some) * some if some else 0.0
            left -= some
        return hits / total


def split(
    text: Tokens, tokenizer: Tokenizer, data_dir: Path, say: Callable[[str], None], wanted: str | None = None
) -> Split:
    """The training tokens and the held-out ones.

    Where text.validation is null, the end of each file is held out, `validation_share` of its tokens, from the nearest
    border of a document on if there is one near. A run that goes on (`wanted` is its data hash) and was begun by a
    version that held out exactly this share, and compared nothing, keeps what it has.

    Raises UserError if a file cannot be read, or if it has an id that the tokenizer has not.
    """
    training, validation = files(text), []
    if text.validation is not None:
        validation = resolve(text.validation, "text.validation", ENDINGS)
    parts: list[_Part] = []
    digest = hashlib.sha256(f"tokens {0 if validation else text.validation_share}".encode())
    for side, paths in enumerate(([path for path in training if path not in validation], validation)):
        for path in paths:
            tokens = np.asarray(opened(path))  # np.memmap is slow to slice
            sha256, most = looked_at(path, tokens, data_dir, say)
            if most >= tokenizer.vocab:
                raise UserError(
                    f"{path} has the token {most:,}, and the tokenizer has {tokenizer.vocab:,}: give text.tokenizer, "
                    "the one that made this file"
                )
            digest.update(f" {side} {sha256}".encode())
            held = 0 if validation else round(text.validation_share * len(tokens))
            parts.append(_Part(path, tokens, len(tokens) - held if not side else 0))
    plain = hashlib.sha256(f"{digest.hexdigest()} {tokenizer.hash}".encode()).hexdigest()
    if wanted == plain:
        train, held_out = _sides(parts)
        return Split(train, held_out, [np.empty((0, 2), np.int64) for _ in train], None, plain)
    moved = [_Part(part.path, part.tokens, part.near(tokenizer.end)) for part in parts]
    if any(new.at != old.at for new, old in zip(moved, parts, strict=True)):
        digest.update(f" held out from {[part.at for part in moved]}".encode())
    train, held_out = _sides(moved)
    left_out, seen = _compared(moved, tokenizer.end, digest.hexdigest(), data_dir, say)
    if any(map(len, left_out)):
        digest.update(b" without")
        for spans in left_out:
            digest.update(f" {len(spans)} ".encode() + spans.astype("<i8").tobytes())
    return Split(
        train, held_out, left_out, seen, hashlib.sha256(f"{digest.hexdigest()} {tokenizer.hash}".encode()).hexdigest()
    )


@dataclass(frozen=True)
class _Part:
    """A file, of which the tokens from `at` on are held out."""

    path: Path
    tokens: np.ndarray
    at: int

    def near(self, end: int) -> int:
        """The border of a document next to `at`, up to half of what is held out away, else `at`."""
        reach = min((len(self.tokens) - self.at) // 2, self.at, NEAR)
        first = self.at - reach
        ends = np.flatnonzero(self.tokens[first : self.at + reach] == end) + first + 1
        starts = self.starts
        starts = starts[(starts > first) & (starts < self.at + reach)]
        borders = np.concatenate([ends, starts])
        return int(borders[np.argmin(np.abs(borders - self.at))]) if len(borders) and reach else self.at

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the entries of Megatron's index begin, int64 in ascending order; empty for other files."""
        index = self.path.with_suffix(".idx")
        return megatron_starts(index, self.tokens.dtype.itemsize) if index.exists() else np.empty(0, np.int64)

    def documents(self, held: bool, end: int) -> Iterator[np.ndarray]:
        """Where the documents of a side begin and stop in it, without end tokens, int64 [documents, 2], in blocks."""
        low, high = (self.at, len(self.tokens)) if held else (0, self.at)
        starts = self.starts
        starts = starts[(starts > low) & (starts < high)]
        first = low
        for at in range(low, high, BLOCK):
            stop = min(at + BLOCK, high)
            ends = np.flatnonzero(self.tokens[at:stop] == end) + at
            inside = starts[np.searchsorted(starts, at, "right") : np.searchsorted(starts, stop, "right")]
            begins = np.sort(np.concatenate([[first], ends + 1, inside]))
            stops = np.sort(np.concatenate([ends, inside, np.array([high] * (stop == high), np.int64)]))
            first = int(begins[-1])
            spans = np.stack([begins[: len(stops)], stops], 1) - low
            yield spans[spans[:, 1] > spans[:, 0]]


def _sides(parts: list[_Part]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens of both sides. A file that is held out whole has no part in the training text, and the other way."""
    train = [part.tokens[: part.at] for part in parts if part.at or not len(part.tokens)]
    return train, [part.tokens[part.at :] for part in parts if part.at < len(part.tokens)]


def _compared(
    parts: list[_Part], end: int, sums: str, data_dir: Path, say: Callable[[str], None]
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Split.left_out and Split.seen, which are kept in data_dir under what they depend on. sums: of all tokens."""
    train, held = _sides(parts)
    key = hashlib.sha256(f"{sums} {end}".encode())
    for part in parts:
        key.update(part.starts.astype("<i8").tobytes() + b" ")
    kept = [data_dir / "tokens" / f"{key.hexdigest()}.{what}" for what in ("left", "seen")]
    size = sum(map(len, train))
    looks = size <= LONGEST_LOOK
    places = [max(0, min(len(each), room) - overlap.RUN + 1) for each, room in zip(held, _rooms(held), strict=True)]
    try:
        rows = np.frombuffer(untrusted.read(kept[0], 2**30), "<i8").reshape(-1, 3)
        bits = np.frombuffer(untrusted.read(kept[1], overlap.MOST // 8 + 1), np.uint8)
        found = [rows[rows[:, 0] == number, 1:] for number in range(len(train))]
        whole = all((spans >= 0).all() and (spans <= len(each)).all() for spans, each in zip(found, train, strict=True))
        if whole and sum(map(len, found)) == len(rows) and len(bits) == (-(-sum(places) // 8) if looks else 0):
            seen = np.split(np.unpackbits(bits)[: sum(places)].astype(bool), np.cumsum(places)[:-1]) if held else []
            return found, seen if looks else None
    except (OSError, ValueError):
        pass
    if size > BLOCK:
        say(f"comparing the documents of {len(train)} file{'s' * (len(train) > 1)} with those that are held out")
    hashes, lengths = _hashed(parts, end)
    found = []
    for part in (part for part in parts if part.at or not len(part.tokens)):
        left = [np.empty((0, 2), np.int64)]
        for spans in part.documents(False, end):
            alike = spans[np.isin(spans[:, 1] - spans[:, 0], lengths)]
            same = [_hash(part.tokens[first:stop]) in hashes for first, stop in alike]
            left.append(alike[np.array(same, bool)])
        found.append(np.concatenate(left))
    seen_ = None
    if looks:
        rest = [piece for tokens, spans in zip(train, found, strict=True) for piece in _without(tokens, spans)]
        seen_ = [overlap.repeated(rest, each[:room]) for each, room in zip(held, _rooms(held), strict=True)]
    rows = np.concatenate(
        [np.empty((0, 3), "<i8"), *(np.insert(spans, 0, number, 1) for number, spans in enumerate(found))]
    )
    keep(kept[0], rows.astype("<i8").tobytes())
    keep(kept[1], np.packbits(np.concatenate([np.empty(0, bool), *(seen_ or [])])).tobytes())
    return found, seen_


def _rooms(held: list[np.ndarray]) -> list[int]:
    """How many tokens of each held-out part are looked for: overlap.MOST in all."""
    before = np.cumsum([0, *map(len, held)])[:-1]
    return [int(max(0, overlap.MOST - at)) for at in before]


def _hashed(parts: list[_Part], end: int) -> tuple[set[bytes], np.ndarray]:
    """The hashes of all held-out documents, and their lengths."""
    hashes: set[bytes] = set()
    lengths = np.empty(0, np.int64)
    for part in parts:
        side = part.tokens[part.at :]
        for spans in part.documents(True, end):
            hashes |= {_hash(side[first:stop]) for first, stop in spans}
            lengths = np.union1d(lengths, spans[:, 1] - spans[:, 0])
    return hashes, lengths


def _hash(tokens: np.ndarray) -> bytes:
    """16 bytes that depend on the ids alone, not on their type."""
    digest = hashlib.sha256()
    for at in range(0, len(tokens), BLOCK):
        digest.update(tokens[at : at + BLOCK].astype("<u4").data)
    return digest.digest()[:16]


def _without(tokens: np.ndarray, spans: np.ndarray) -> list[np.ndarray]:
    """What stands between these spans."""
    begins, stops = [0, *spans[:, 1].tolist()], [*spans[:, 0].tolist(), len(tokens)]
    return [tokens[first:stop] for first, stop in zip(begins, stops, strict=True) if stop - first >= overlap.RUN]
