"""Texts that somebody else has turned into tokens: files of Megatron-LM, of llm.c and of NumPy, read where they are.

    .npy           a vector of integers
    .bin + .idx    Megatron-LM's indexed data set, version 1; the documents are the sequences of the index
    .bin           llm.c's: 256 numbers of 4 bytes, of which the first are 20240520 (ids of 2 bytes) or 20240801 (ids of
                   4 bytes), 1, and how many tokens there are; then the tokens

Nothing is copied. Each file is read once, for its sum and its largest id, and what was found is kept in `data_dir`
under the file's path, size and time of change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
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
    keep(known, {"sha256": found[0], "most": found[1]})
    return found


def split(
    text: Tokens, vocab: int, data_dir: Path, say: Callable[[str], None]
) -> tuple[list[np.ndarray], list[np.ndarray], str]:
    """The training tokens and the held-out ones, a part a file, and a hash of all of them.

    Where text.validation is null, the end of each file is held out, `validation_share` of its tokens.

    Raises UserError if a file cannot be read, or if it has an id that the tokenizer has not.
    """
    training, validation = files(text), []
    if text.validation is not None:
        validation = resolve(text.validation, "text.validation", ENDINGS)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    digest = hashlib.sha256(f"tokens {0 if validation else text.validation_share}".encode())
    for side, paths in enumerate(([path for path in training if path not in validation], validation)):
        for path in paths:
            tokens = opened(path)
            sha256, most = looked_at(path, tokens, data_dir, say)
            if most >= vocab:
                raise UserError(
                    f"{path} has the token {most:,}, and the tokenizer has {vocab:,}: give text.tokenizer, the one "
                    "that made this file"
                )
            digest.update(f" {side} {sha256}".encode())
            held = 0 if validation else round(text.validation_share * len(tokens))
            sides[side].append(tokens[: len(tokens) - held])
            if held:
                sides[1].append(tokens[len(tokens) - held :])
    return *sides, digest.hexdigest()
