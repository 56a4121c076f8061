"""prepared text: `data_dir/<key>/` with train.bin, validation.bin and tokenizer.json, made once, never changed.

The key is a hash of everything that shaped it: settings, files with sizes and times, versions. A folder of that
name is whole, because it is built beside and renamed. One run builds, under a file lock that a kill releases;
others wait for it.

A shard is a header of 1,024 bytes (8 of magic, then JSON, then spaces) and the tokens, little-endian.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hvdllm.config.schema import Files, Text
from hvdllm.errors import UserError
from hvdllm.text.corpus import Document, documents, encoding_note, sources, unreadable
from hvdllm.text.tokenize import BYTES, Tokenizer, train_bpe

FORMAT = 1
MAGIC = b"hvdllm\x00\x01"
HEADER = 1024  # bytes; a multiple of every dtype, so that tokens are aligned
VERIFY = 256 * 2**20  # bytes; a shard up to this size is hashed at every open (0.1 s at most), size and header always
NOTES = "notes.json"  # sentences for a person, beside the shards
LONGEST = 2**16  # bytes that are read of them
LOOKED = 2**20  # bytes of text in which a tokenizer of the user's is checked
ENCODE = 2 * 2**20  # characters of text tokenized at a time; `tokenizers` takes about 100 bytes for each token of it


@dataclass(frozen=True)
class Shard:
    """What the header of a token file says."""

    dtype: str  # "<u2" or "<u4"
    tokens: int
    bytes: int  # of the text as UTF-8; the end tokens between documents stand for none
    documents: int  # pieces that go on where the last stopped not counted
    vocab: int
    tokenizer: str  # hash of its tokenizer.json
    content: str  # sha256 of the tokens
    spelled: int | None = None  # bytes that its tokens stand for; not of text that an older version prepared


@dataclass(frozen=True)
class Corpus:
    """A prepared text, open."""

    folder: Path
    train: np.ndarray  # uint16 or uint32 [tokens], a memory map
    validation: np.ndarray  # the same; empty where nothing could be held out
    tokenizer: Tokenizer
    data_hash: str  # of tokens and tokenizer, no path or time in it: equal on all machines with the same data
    train_shard: Shard
    validation_shard: Shard
    notes: list[str]  # one sentence each, for a person

    @property
    def train_bytes(self) -> int:
        """Bytes of text the training tokens stand for."""
        return self.train_shard.bytes


def data_folder(data_dir: str | None) -> Path:
    """Where shards live: the setting, or hvdllm's folder in the user's cache."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdllm"


def prepare(text: Text, data_dir: Path, *, say: Callable[[str], None]) -> Corpus:
    """Opens the prepared text, after preparing it where it is missing.

    Safe to call in several processes at the same time (one prepares, the others wait) and to kill at any moment
    (the next call starts afresh and removes what was left). `say` gets a sentence where it takes time.
    Raises UserError: text or tokenizer that cannot be read, a folder that cannot be written, a damaged shard.
    """
    recipe = _recipe(text)
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = data_dir / key
    if not folder.is_dir():
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with _locked(data_dir / f"{key}.lock", say):
                if not folder.is_dir():
                    _sweep(data_dir)
                    say(f"preparing the text, once, into {folder}")
                    part = data_dir / f"{key}.part"
                    try:
                        _build(text, part)
                        if _recipe(text) != recipe:
                            raise UserError("the text changed while it was read: start again when it is complete")
                        part.rename(folder)
                        _sync(data_dir)
                    finally:
                        shutil.rmtree(part, ignore_errors=True)  # a full disk stays full otherwise
        except OSError as error:
            raise UserError(
                f"prepared text cannot be written to {data_dir} ({error.strerror or error}): "
                "make room there, or choose another folder with data_dir=…"
            ) from None
    return _open(folder, text)


def prepared(data_dir: Path, data_hash: str, text: Text) -> Corpus | None:
    """The prepared text of this hash, wherever its files were, if it lies in data_dir; None where it does not."""
    for folder in sorted(path.parent for path in data_dir.glob("*/train.bin")):
        try:
            said = [_header(folder / f"{name}.bin").content for name in ("train", "validation")]
            if _joined([Tokenizer.load(folder / "tokenizer.json").hash, *said]) == data_hash:
                return _open(folder, text)
        except (OSError, TypeError, ValueError, RecursionError, UserError):  # a damaged one is another's affair
            continue
    return None


def _joined(hashes: list[str]) -> str:
    """One hash of the tokenizer's and the shards'."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _header(path: Path) -> Shard:
    """Raises ValueError or TypeError where the file does not begin like a shard, OSError where it cannot be read."""
    with path.open("rb") as file:
        data = file.read(HEADER)
    if not data.startswith(MAGIC):
        raise ValueError("it does not begin like a token file of this version")
    return Shard(**json.loads(data[len(MAGIC) :]))


def _recipe(text: Text) -> dict[str, Any]:
    """Everything that shapes the tokens, as JSON."""
    training, validation = sources(text)
    settings = dataclasses.asdict(text)
    del settings["validation"], settings["tokenizer"], settings["vocab"]
    settings.pop("path", None)
    recipe = {
        "format": FORMAT,
        "text": type(text).__name__,
        **settings,
        "training": [_stat(path) for path in training],
        "validation": [_stat(path) for path in validation],
    }
    if not isinstance(text, Files):
        recipe["python"] = platform.python_version()
    if text.tokenizer == "bytes":
        recipe["tokenizer"] = BYTES
    else:
        recipe["tokenizers"] = tokenizers.__version__
        recipe["tokenizer"] = text.vocab if text.tokenizer == "bpe" else _sha256(_users(text))
    return recipe


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def _stat(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return str(path), stat.st_size, stat.st_mtime_ns


def _users(text: Text) -> Path:
    """The tokenizer.json that text.tokenizer names."""
    path = Path(text.tokenizer).expanduser()
    if not path.is_file():
        raise UserError(f"text.tokenizer={text.tokenizer} is neither bytes nor bpe nor a file: correct it")
    return path


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds an exclusive lock on a file, which stays. The kernel gives it back when the process ends, however."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run prepares this text: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(data_dir: Path) -> None:
    """Removes what killed runs left half built: the .part folders whose lock nobody holds (ours we hold)."""
    for part in data_dir.glob("*.part"):
        with part.with_suffix(".lock").open("w") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)


def _build(text: Text, part: Path) -> None:
    """Makes the three files in the folder `part`. Reads the text twice where a BPE is trained, and never holds
    more of it than a few MB."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    if text.tokenizer == "bytes":
        tokenizer = Tokenizer(BYTES)
    elif text.tokenizer == "bpe":
        tokenizer = train_bpe((each.text for each in documents(text) if not each.held_out), text.vocab)
    else:
        tokenizer = Tokenizer.load(_users(text))
    tokenizer.save(part / "tokenizer.json")
    notes = [note] if (note := encoding_note(text)) else []
    lost = Lost(tokenizer)
    with _Writer(part / "train.bin", tokenizer) as train, _Writer(part / "validation.bin", tokenizer) as validation:
        for batch in _batches(documents(text)):
            for each, ids in zip(batch, tokenizer.encode([each.text for each in batch]), strict=True):
                (validation if each.held_out else train).add(each, ids)
                lost.look(each, ids)
        if train.tokens == 0:
            raise UserError(
                everything_held_out(text)
                if validation.tokens
                else "the text is empty: text.path names files without a character"
            )
    notes += [note] if (note := lost.note()) else []
    (part / NOTES).write_text(json.dumps(notes))
    for file in part.iterdir():
        _sync(file)
    _sync(part)


def everything_held_out(text: Text) -> str:
    if text.validation is not None:
        return "text.path names nothing but the text of text.validation: give it other text to train on"
    return "all of the text is held out for validation: lower text.validation_share, or set text.validation"


class Lost:
    """Does a tokenizer of the user's keep the text? LOOKED bytes of it are spelled and read again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.bytes, self.spelled = tokenizer, 0, 0
        self.first: str | None = None

    def look(self, document: Document, ids: np.ndarray) -> None:
        if self.bytes > LOOKED or self.tokenizer.exact:
            return
        self.bytes += len(document.text.encode())
        self.spelled += int(self.tokenizer.token_bytes[ids].sum())
        if self.first is None and self.tokenizer.decode(ids).strip() != document.text.strip():
            self.first = document.name

    def note(self) -> str | None:
        if self.first is None:
            return None
        share = f"its tokens stand for {self.spelled / max(self.bytes, 1):.1%} of the bytes, and "
        return (
            f"the tokenizer loses or changes text: {share if self.spelled < self.bytes else ''}{self.first} does not "
            "come back as it was (letters that it does not know, lower case, a normal form?)"
        )


def _batches(texts: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about ENCODE characters."""
    batch: list[Document] = []
    size = 0
    for each in texts:
        batch.append(each)
        size += len(each.text)
        if size >= ENCODE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes a shard; the header last, so that a file cut short has none."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(HEADER))
        self._tokenizer = tokenizer
        self._dtype = np.dtype(tokenizer.dtype).newbyteorder("<")
        self._hash = hashlib.sha256()
        self.tokens = self._bytes = self._documents = self._spelled = 0

    def __enter__(self) -> _Writer:
        return self

    def add(self, document: Document, ids: np.ndarray) -> None:
        if not document.joins:
            if self._documents:
                self._write(np.array([self._tokenizer.end]))
            self._documents += 1
        self._write(ids)
        self._bytes += len(document.text.encode())
        self._spelled += int(self._tokenizer.token_bytes[ids].sum())

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    def __exit__(self, *_: object) -> None:
        shard = Shard(
            self._dtype.str,
            self.tokens,
            self._bytes,
            self._documents,
            self._tokenizer.vocab,
            self._tokenizer.hash,
            self._hash.hexdigest(),
            self._spelled,
        )
        with self._file as file:
            file.seek(0)
            file.write((MAGIC + json.dumps(dataclasses.asdict(shard)).encode()).ljust(HEADER - 1) + b"\n")


def _sync(path: Path) -> None:
    """Until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open(folder: Path, text: Text) -> Corpus:
    """The prepared text in `folder`, checked."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    train, train_shard = open_shard(folder / "train.bin", tokenizer)
    validation, validation_shard = open_shard(folder / "validation.bin", tokenizer)
    hashes = [tokenizer.hash, train_shard.content, validation_shard.content]
    notes = _notes(folder / NOTES)
    if text.tokenizer == "bpe" and tokenizer.vocab < text.vocab:
        notes.append(f"the text yields {tokenizer.vocab:,} tokens, fewer than the {text.vocab:,} of text.vocab")
    if validation_shard.tokens == 0:
        notes.append("nothing of the text is held out for validation")
    return Corpus(
        folder,
        train,
        validation,
        tokenizer,
        _joined(hashes),
        train_shard,
        validation_shard,
        notes,
    )


def _notes(path: Path) -> list[str]:
    """What was found when the text was prepared; nothing where an older version did it."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LONGEST))
    except (OSError, ValueError, RecursionError):
        return []
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def open_shard(path: Path, tokenizer: Tokenizer) -> tuple[np.ndarray, Shard]:
    """(tokens [n] as a memory map, header) of a token file made with `tokenizer`.

    Raises UserError where the file is not what its header says (size always, content up to VERIFY bytes), or
    the header does not go with the tokenizer.
    """
    try:
        data = np.asarray(np.memmap(path, np.uint8, "r"))  # np.memmap is slow to slice; its map lives on in .base
        shard = _header(path)
        dtype = np.dtype(shard.dtype)
        if len(data) != HEADER + shard.tokens * dtype.itemsize:
            raise ValueError(f"its header promises {shard.tokens:,} tokens, its size is {len(data):,} bytes")
        tokens = data[HEADER:].view(dtype)
        if shard.tokenizer != tokenizer.hash:
            raise ValueError("it was made with another tokenizer than the one beside it")
        if tokenizer.vocab > np.iinfo(dtype).max + 1:
            raise ValueError(f"the vocabulary of {tokenizer.vocab:,} tokens is larger than its {dtype} can hold")
        if data.nbytes <= VERIFY:
            if hashlib.sha256(tokens.data).hexdigest() != shard.content:
                raise ValueError("its tokens are not those that were written")
            if tokens.max(initial=0) >= tokenizer.vocab:
                raise ValueError(f"it holds the token {tokens.max()}, the tokenizer has only {tokenizer.vocab}")
    except (OSError, TypeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is damaged ({why}): delete the folder {path.parent}, it is then made anew") from None
    return tokens, shard
