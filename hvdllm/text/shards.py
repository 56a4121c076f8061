"""Prepared text: the folder `data_dir/<key>/` with train.bin, validation.bin and tokenizer.json.

It is made once and never changed. The key is a hash of everything that shaped it: the settings, the files with their
sizes and times, and the versions of what made it. A folder with its final name is complete, because it is built under
another name and then renamed. One process builds it, under a file lock that is released even if the process is killed;
the others wait.

A shard is a header of 1,024 bytes (8 bytes of magic, then JSON, then spaces), followed by the tokens, little-endian.
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

import numpy as np
import tokenizers

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text import overlap
from hvdllm.text.chat import AROUND, Around, Template, template, written
from hvdllm.text.conversations import BEGINS, COUNTS, IDS
from hvdllm.text.corpus import Document, documents, encoding_note, sources, unreadable
from hvdllm.text.parts import Text
from hvdllm.text.tokenize import BYTES, Tokenizer, train_bpe

FORMAT = 2  # 1: pieces of large documents ended at 64 KiB, whatever they held
MAGIC = b"hvdllm\x00\x01"
HEADER = 1024  # bytes; a multiple of every dtype, so that tokens are aligned
VERIFY = 256 * 2**20  # bytes; every rank hashes a shard up to this size, and one rank of a host a larger one
NOTES = "notes.json"  # sentences for a person, beside the shards
LONGEST = 2**16  # bytes of the notes that are read
LOOKED = 2**20  # bytes of text on which a tokenizer of the user's is checked
SEEN = "seen.bits"  # what overlap.repeated found, one bit for each place of the validation text
ENCODE = 2 * 2**20  # characters of text tokenized at a time; `tokenizers` takes about 100 bytes for each token of it


@dataclass(frozen=True)
class Shard:
    """What the header of a token file says."""

    dtype: str  # "<u2" or "<u4"
    tokens: int
    bytes: int  # of the text as UTF-8; the end tokens between documents stand for none
    documents: int  # pieces that continue a document are not counted
    vocab: int
    tokenizer: str  # hash of its tokenizer.json
    content: str  # sha256 of the tokens
    spelled: int | None = None  # bytes that its tokens stand for; None if an older version prepared the text
    flagged: bool = False  # its tokens have the flags of text/conversations.py; bytes are those of tokens that count


@dataclass(frozen=True)
class Corpus:
    """A prepared text, open."""

    folder: Path
    train: np.ndarray  # uint16 or uint32 [tokens], a memory map
    validation: np.ndarray  # the same; empty if nothing could be held out
    tokenizer: Tokenizer
    data_hash: str  # of tokens and tokenizer, not of paths or times: equal on all machines with the same data
    train_shard: Shard
    validation_shard: Shard
    notes: list[str]  # one sentence each, for a person
    seen: np.ndarray | None = None  # see text/overlap.py; None if an older version prepared the text
    around: Around | None = None  # of conversations: what their template puts around a question

    @property
    def train_bytes(self) -> int:
        """Bytes of text the training tokens stand for."""
        return self.train_shard.bytes

    def repeated(self, context: int, eval_tokens: int) -> float | None:
        """The share of evaluated windows with overlap.RUN tokens in a row that the training text has too.

        eval_tokens is the setting: how many tokens are evaluated, 0 for all. Returns None if the share is not known, or
        if there is nothing to evaluate.
        """
        windows = max(0, (len(self.validation) - 1) // context)
        if eval_tokens:
            windows = min(windows, max(1, eval_tokens // context))
        return None if self.seen is None or not windows else overlap.share(self.seen, context, windows)


def data_folder(data_dir: str | None) -> Path:
    """The folder of all prepared texts: the setting, or hvdllm's folder in the user's cache."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdllm"


def prepare(
    text: Text,
    data_dir: Path,
    *,
    say: Callable[[str], None],
    whole: bool = True,
    wanted: str | None = None,
    apart: frozenset[int] = frozenset(),
) -> Corpus:
    """Opens the prepared text; prepares it first if it is missing.

    Several processes may call this at the same time: one prepares the text and the others wait. It may be killed at any
    moment: the next call starts afresh and removes what was left.

    Args:
        text: the settings of the group `text`.
        data_dir: the folder of all prepared texts.
        say: gets a sentence before anything that takes time.
        whole: whether large shards are hashed too, which takes a second for each GB or two. One rank of a host does it.
        wanted: the data hash of the run that is resumed. If an older version of hvdllm has prepared the text with this
            hash from these files, that text is taken as it is.
        apart: hashes of documents (corpus.hash_of) that another text holds out. They are not trained on.

    Raises UserError if the text or the tokenizer cannot be read, if the folder cannot be written, or if a shard is
    damaged.
    """
    if text.prepared is not None:
        found = find(data_dir, text.prepared)
        if found is None:
            raise UserError(f"text.prepared={text.prepared}: no text in {data_dir} has this data hash; give data_dir=")
        return _open(found, text, say, whole)
    beside = {"apart": hashlib.sha256(json.dumps(sorted(apart)).encode()).hexdigest()} if apart else {}
    recipe = recipe_of(text) | beside
    for older in range(1, FORMAT) if wanted is not None else ():
        before = data_dir / key_of({**recipe, "format": older})
        if before.is_dir() and find(data_dir, wanted, before.name) is not None:
            return _open(before, text, say, whole)

    def build(part: Path) -> None:
        _build(text, part, mode_of(text), apart)
        if recipe_of(text) | beside != recipe:
            raise UserError("the text changed while it was read: start again when it is complete")

    folder = once(data_dir, key_of(recipe), build, "text", say)
    return _open(folder, text, say, whole)


def once(data_dir: Path, key: str, build: Callable[[Path], None], what: str, say: Callable[[str], None]) -> Path:
    """The folder data_dir/key, which is made if it is missing. Of several processes one makes it, and the others wait.

    Args:
        data_dir: the folder of all prepared data.
        key: the name of the folder.
        build: makes the folder under another name, which it is given, and syncs it.
        what: is prepared, in a word.
        say: gets a sentence before anything that takes time.

    Raises UserError if the folder cannot be written.
    """
    folder = data_dir / key
    if folder.is_dir():
        return folder
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir / f"{key}.lock", what, say):
            if not folder.is_dir():
                _sweep(data_dir)
                say(f"preparing the {what}, once, into {folder}")
                part = data_dir / f"{key}.part"
                try:
                    build(part)
                    part.rename(folder)
                    _sync(data_dir)
                finally:
                    shutil.rmtree(part, ignore_errors=True)  # a full disk stays full otherwise
    except OSError as error:
        raise UserError(
            f"prepared {what} cannot be written to {data_dir} ({error.strerror or error}): "
            "make room there, or choose another folder with data_dir=…"
        ) from None
    return folder


def key_of(recipe: Json) -> str:
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def find(data_dir: Path, data_hash: str | None, name: str = "*") -> Path | None:
    """The folder of the prepared text that has this data hash; None if there is none.

    Only the headers of the shards are read. `name` limits the search to folders of this name.
    """
    for folder in sorted(data_dir.glob(f"{name}/train.bin")) if data_dir.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, TypeError):
            heads = [_head(folder.with_name(f"{side}.bin")) for side in ("train", "validation")]
            if _data_hash(heads[0].tokenizer, heads) == data_hash:
                return folder.parent
    return None


def _head(path: Path) -> Shard:
    """The header of a token file. Raises OSError, ValueError or TypeError if it has none."""
    with untrusted.opened(path) as file:
        data = file.read(HEADER)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin like a token file of this version")
    return Shard(**untrusted.parsed(data[len(MAGIC) :]))


def _data_hash(tokenizer: str, heads: list[Shard]) -> str:
    return hashlib.sha256(" ".join([tokenizer, *(head.content for head in heads)]).encode()).hexdigest()


def recipe_of(text: Text) -> Json:
    """Everything that shapes the tokens, as plain values for JSON."""
    training, validation = sources(text)
    settings = dataclasses.asdict(text)
    del settings["validation"], settings["tokenizer"], settings["vocab"], settings["prepared"]
    settings.pop("path", None)
    recipe = {
        "format": FORMAT,
        "text": type(text).__name__,
        **settings,
        "training": [_stat(path) for path in training],
        "validation": [_stat(path) for path in validation],
    }
    if not text.users:
        recipe["python"] = platform.python_version()
    if text.tokenizer == "bytes":
        recipe["tokenizer"] = BYTES
    else:
        recipe["tokenizers"] = tokenizers.__version__
        recipe["tokenizer"] = text.vocab if text.tokenizer == "bpe" else _sha256(_users(text))
    if text.conversations:
        recipe["template"] = hashlib.sha256(_template(text).source.encode()).hexdigest()
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
    """The user's tokenizer.json, which text.tokenizer names."""
    path = Path(text.tokenizer).expanduser()
    if not path.is_file():
        raise UserError(f"text.tokenizer={text.tokenizer} is neither bytes nor bpe nor a file: correct it")
    return path


def _template(text: Text) -> Template:
    """The template of a text of conversations."""
    own = text.tokenizer in ("bytes", "bpe")
    return template(None if own else _users(text), getattr(text, "template", "auto"))


@contextlib.contextmanager
def _locked(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds an exclusive lock on a file, which is left in place.

    The kernel releases the lock when the process ends, whatever ends it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run prepares this {what}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(data_dir: Path) -> None:
    """Removes what killed processes left half built: the .part folders whose lock nobody holds.

    The lock of our own folder is held by us.
    """
    for part in data_dir.glob("*.part"):
        with part.with_suffix(".lock").open("w") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part)


def mode_of(text: Text) -> int:
    """The mode of the prepared files: they may be read by those who may read all files of the text.

    If one file of the text is 0600, so are the prepared files.
    """
    training, validation = sources(text)
    tokenizer = [] if text.tokenizer in ("bytes", "bpe") else [_users(text)]
    mode = 0o666
    for path in (*training, *validation, *tokenizer):
        try:
            mode &= path.stat().st_mode | 0o600
        except OSError as error:
            raise unreadable(path, error) from None
    return mode


def _build(text: Text, part: Path, mode: int, apart: frozenset[int]) -> None:
    """Makes the files of a prepared text in the folder `part`, with the given mode.

    The text is read twice if a BPE is trained. No more than a few MB of it are in memory at a time.
    """
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(0o700)
    if text.tokenizer == "bytes":
        tokenizer = Tokenizer(BYTES)
    elif text.tokenizer == "bpe":
        tokenizer = train_bpe(spoken(text, apart), text.vocab)
    else:
        tokenizer = Tokenizer.load(_users(text))
    tokenizer.save(part / "tokenizer.json")
    notes = [note] if (note := encoding_note(text)) else []
    lost = Lost(tokenizer)
    copies: list[str] = []
    template, flagged = _template(text) if text.conversations else None, text.conversations
    if template is not None:
        (part / AROUND).write_text(template.around().json())
    with (
        _Writer(part / "train.bin", tokenizer, flagged) as train,
        _Writer(part / "validation.bin", tokenizer, flagged) as validation,
    ):
        for batch in _batches(documents(text, copies, apart)):
            if template is not None:
                _converse(batch, template, tokenizer, train, validation)
                continue
            for each, ids in zip(batch, tokenizer.encode([each.text for each in batch]), strict=True):
                (validation if each.held_out else train).add(each, ids)
                lost.look(each, ids)
        if train.tokens == 0:
            raise UserError(everything_held_out(text) if validation.tokens else EMPTY)
    notes += [note] if (note := lost.note()) else []
    notes += [copies_note(copies)] if copies else []
    (part / NOTES).write_text(json.dumps(notes))
    sides = [open_shard(part / f"{side}.bin", tokenizer, whole=False)[0] for side in ("train", "validation")]
    if not flagged:
        np.packbits(overlap.repeated(*sides)).tofile(part / SEEN)
    seal(part, mode)


def spoken(text: Text, apart: frozenset[int] = frozenset()) -> Iterator[str]:
    """The training documents as text without marks, from which a tokenizer learns."""
    for each in documents(text, apart=apart):
        if not each.held_out:
            yield written(json.loads(each.text)) if text.conversations else each.text


def seal(folder: Path, mode: int) -> None:
    """Gives the files of a folder this mode, and waits until all of it is on the disk."""
    for file in folder.iterdir():
        mode &= file.stat().st_mode  # the user's umask may take away more
        file.chmod(mode)
        _sync(file)
    folder.chmod(0o700 | mode | (mode & 0o444) >> 2)  # who may read the files may enter the folder
    _sync(folder)


def _converse(
    batch: list[Document], template: Template, tokenizer: Tokenizer, train: _Writer, validation: _Writer
) -> None:
    """Writes conversations. Raises UserError if nothing of one counts."""
    encoded = template.encode(tokenizer, [(each.name, json.loads(each.text)) for each in batch])
    for each, (ids, counts) in zip(batch, encoded, strict=True):
        if not counts[1:].any():
            raise UserError(f"{each.name}: its template writes nothing that the assistant says, take the line out")
        (validation if each.held_out else train).converse(ids, counts)


EMPTY = "the text is empty: text.path names files without a character"


def everything_held_out(text: Text) -> str:
    """The sentence for a text of which nothing is left to train on."""
    if text.validation is not None:
        return "text.path names nothing but the text of text.validation: give it other text to train on"
    return "all of the text is held out for validation: lower text.validation_share, or set text.validation"


def copies_note(names: list[str]) -> str:
    """The sentence about documents that were left out because text.validation has them too."""
    files = list(dict.fromkeys(names))
    what = f"{files[0]} has" if len(files) == 1 else f"{len(files)} documents of text.path, first {files[0]}, have"
    return f"{what} text that text.validation has too; it was left out of the training text"


class Lost:
    """Checks whether a tokenizer of the user's keeps the text: LOOKED bytes are encoded and decoded again."""

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
    """The documents in lists of about ENCODE characters each."""
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
    """Writes a shard. The header is written last, so that a file that was cut short has none."""

    def __init__(self, path: Path, tokenizer: Tokenizer, flagged: bool = False) -> None:
        self._file = path.open("wb")
        self._file.write(bytes(HEADER))
        self._tokenizer = tokenizer
        self._flagged = flagged
        self._dtype = np.dtype(np.uint32 if flagged else tokenizer.dtype).newbyteorder("<")
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

    def converse(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Adds a conversation. counts: whether each of its tokens counts, bool [tokens]."""
        flags = np.where(counts, COUNTS, np.uint32(0))
        flags[0] |= BEGINS
        self._write(ids.astype(np.uint32) | flags)
        self._documents += 1
        spelled = int(self._tokenizer.token_bytes[ids[counts]].sum())
        self._bytes, self._spelled = self._bytes + spelled, self._spelled + spelled

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
            self._flagged,
        )
        with self._file as file:
            file.seek(0)
            file.write((MAGIC + json.dumps(dataclasses.asdict(shard)).encode()).ljust(HEADER - 1) + b"\n")


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open(folder: Path, text: Text, say: Callable[[str], None], whole: bool) -> Corpus:
    """Opens and checks the prepared text in `folder`."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    size = sum(file.stat().st_size for file in folder.glob("*.bin"))
    if whole and size > 8 * VERIFY:
        say(f"comparing the prepared text with its sums, {size / 1e9:.1f} GB")
    train, train_shard = open_shard(folder / "train.bin", tokenizer, whole)
    validation, validation_shard = open_shard(folder / "validation.bin", tokenizer, whole)
    if {train_shard.flagged, validation_shard.flagged} != {text.conversations}:
        other = "files" if text.conversations else "chat"
        raise UserError(f"the prepared text in {folder} is not of this kind: give text={other} with it")
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
        _data_hash(tokenizer.hash, [train_shard, validation_shard]),
        train_shard,
        validation_shard,
        notes,
        _seen(folder / SEEN, len(validation)),
        Around.load(folder / AROUND) if text.conversations else None,
    )


def _notes(path: Path) -> list[str]:
    """The sentences that were written when the text was prepared; none if an older version prepared it."""
    try:
        found = untrusted.read_json(path, LONGEST)
    except (OSError, untrusted.Unfit):
        return []
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _seen(path: Path, tokens: int) -> np.ndarray | None:
    """What overlap.repeated found, bool [places]; None if an older version prepared the text."""
    places = max(0, min(tokens, overlap.MOST) - overlap.RUN + 1)
    try:
        bits = np.frombuffer(untrusted.read(path, overlap.MOST // 8 + 1), dtype=np.uint8)
    except (OSError, untrusted.Unfit):
        return None
    return np.unpackbits(bits)[:places].astype(bool)


def open_shard(path: Path, tokenizer: Tokenizer, whole: bool = True) -> tuple[np.ndarray, Shard]:
    """Opens a token file that was made with `tokenizer`.

    Returns the tokens [n] as a memory map, and the header.

    Raises UserError if the file is not what its header says, or if the header does not go with the tokenizer. The size
    is always compared; the content is compared if `whole` is true or the file is small.
    """
    try:
        untrusted.opened(path).close()  # a regular file
        data = np.asarray(np.memmap(path, np.uint8, "r"))  # np.memmap is slow to slice; its map lives on in .base
        shard = _head(path)
        dtype = np.dtype(shard.dtype)
        if len(data) != HEADER + shard.tokens * dtype.itemsize:
            raise ValueError(f"its header promises {shard.tokens:,} tokens, its size is {len(data):,} bytes")
        tokens = data[HEADER:].view(dtype)
        if shard.tokenizer != tokenizer.hash:
            raise ValueError("it was made with another tokenizer than the one beside it")
        if tokenizer.vocab > np.iinfo(dtype).max + 1:
            raise ValueError(f"the vocabulary of {tokenizer.vocab:,} tokens is larger than its {dtype} can hold")
        if whole or data.nbytes <= VERIFY:
            if hashlib.sha256(tokens.data).hexdigest() != shard.content:
                raise ValueError("its tokens are not those that were written")
            if (most := _largest(tokens, shard.flagged)) >= tokenizer.vocab:
                raise ValueError(f"it holds the token {most}, the tokenizer has only {tokenizer.vocab}")
    except (OSError, TypeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is damaged ({why}): delete the folder {path.parent}, it is then made anew") from None
    return tokens, shard


def _largest(tokens: np.ndarray, flagged: bool) -> int:
    """The largest id, without flags. A part of the tokens is looked at at a time."""
    if not flagged:
        return int(tokens.max(initial=0))
    parts = (tokens[at : at + VERIFY // 4] & IDS for at in range(0, len(tokens), VERIFY // 4))
    return max((int(part.max()) for part in parts), default=0)
