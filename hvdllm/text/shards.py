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
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text import overlap
from hvdllm.text.chat import AROUND, IDS, Around, Template, template, written
from hvdllm.text.corpus import TRAIN, encoding_note, hash_of, packs, read, rule, sources, unreadable
from hvdllm.text.encode import Chunk, Copies, Encoder, Lost, Part, Run, chunks, joins
from hvdllm.text.parts import Text
from hvdllm.text.progress import HowFar
from hvdllm.text.tokenize import BYTES, Tokenizer, train_bpe
from hvdllm.text.workers import Workers

FORMAT = 2  # 1: pieces of large documents ended at 64 KiB, whatever they held
MAGIC = b"hvdllm\x00\x01"
HEADER = 1024  # bytes; a multiple of every dtype, so that tokens are aligned
VERIFY = 256 * 2**20  # bytes; every rank hashes a shard up to this size, and one rank of a host a larger one
NOTES = "notes.json"  # sentences for a person, beside the shards
LONGEST = 2**16  # bytes of the notes that are read
SEEN = "seen.bits"  # what overlap.repeated found, one bit for each place of the validation text
ENCODE = 2 * 2**20  # bytes of text tokenized at a time; `tokenizers` takes about 100 bytes for each token of it
LARGE = 32 * 2**20  # bytes of text from which on processes encode it; they take a second to start
JOURNAL = "journal.jsonl"  # in a folder that is being built: what is done, for a process that goes on
NOTED = 32 * 2**20  # bytes of text between two of its lines
KEPT = 7 * 24 * 3600  # seconds after which the unfinished work of others is removed
LEARNT = 2**30  # bytes of text that a BPE is trained on at most; more than that is sampled
UNPACKED = 4  # bytes of text that a byte of a .gz file is taken for where the size of a text matters


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

    Several processes may call this at the same time: one prepares the text and the others wait. A large text is encoded
    on all cores that this process may use. It may be killed at any moment: the next call goes on with what was done,
    once its sums are compared. The result is the same for any number of cores and any kills.

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
    text = text.plain
    if text.prepared is not None:
        found = find(data_dir, text.prepared)
        if found is None:
            raise UserError(f"text.prepared={text.prepared}: no text in {data_dir} has this data hash; give data_dir=")
        return _open(found, text, say, whole)
    beside = {"apart": hashlib.sha256(json.dumps(sorted(apart)).encode()).hexdigest()} if apart else {}
    recipe = recipe_of(text) | beside
    whole_text = {key: value for key, value in recipe.items() if key != "learnt"}  # older versions sampled nothing
    for older in range(1, FORMAT + 1) if wanted is not None else ():
        before = data_dir / key_of({**whole_text, "format": older})
        if before.is_dir() and find(data_dir, wanted, before.name) is not None:
            return _open(before, text, say, whole)

    def build(part: Path) -> None:
        _build(text, part, mode_of(text), say, apart)
        if recipe_of(text) | beside != recipe:
            raise UserError("the text changed while it was read: start again when it is complete")

    folder = once(data_dir, key_of(recipe), build, "text", say)
    return _open(folder, text, say, whole)


def once(data_dir: Path, key: str, build: Callable[[Path], None], what: str, say: Callable[[str], None]) -> Path:
    """The folder data_dir/key, which is made if it is missing. Of several processes one makes it, and the others wait.

    Args:
        data_dir: the folder of all prepared data.
        key: the name of the folder.
        build: makes the folder under another name, which it is given, and syncs it. What it has done when it is ended
          stays if there is a JOURNAL in it, for the next call.
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
                except BaseException as error:
                    # A full disk stays full otherwise; and what cannot be read is read anew once it is corrected.
                    if isinstance(error, OSError | UserError) or not (part / JOURNAL).exists():
                        shutil.rmtree(part, ignore_errors=True)
                    raise
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
    if text.tokenizer == "bpe" and _size(training) > LEARNT:
        recipe["learnt"] = LEARNT
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


def _size(files: list[Path]) -> int:
    """About how many bytes of text there are in these files, from their sizes alone."""
    return sum(_stat(path)[1] * (UNPACKED if packs(path) else 1) for path in files)


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

    Those with a journal are kept for a week after its last line, so that the same command can go on. The lock of our
    own folder is held by us.
    """
    for part in data_dir.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - (part / JOURNAL).stat().st_mtime < KEPT:
                continue
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


def _build(text: Text, part: Path, mode: int, say: Callable[[str], None], apart: frozenset[int]) -> None:
    """Makes the files of a prepared text in the folder `part`, with the given mode, or goes on with them.

    The text is read twice if a BPE is trained, which begins anew if it is killed. No more than a few MB of it for each
    core are in memory at a time, and the words that a BPE is trained on.
    """
    (training, validation), sides = sources(text), rule(text, apart)
    tokenizer = _kept_tokenizer(part)
    if tokenizer is None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(0o700)
        tokenizer = learnt(text, say, apart)
        tokenizer.save(part / "tokenizer.json")
        (part / JOURNAL).write_text(json.dumps({"tokenizer": tokenizer.hash}) + "\n")
    tokenizer.ours = text.tokenizer == "bpe"
    notes = [note] if (note := encoding_note(text)) else []
    kind = (str(_users(text)) if text.tokenizer not in ("bytes", "bpe") else None, getattr(text, "template", "auto"))
    encoder = Encoder(sides, tokenizer, kind if text.conversations else None)
    if text.conversations:
        (part / AROUND).write_text(_template(text).around().json())
    with contextlib.closing(_Building(part, encoder)) as building:
        total = sum(_stat(path)[1] for path in (*training, *validation))
        progress = HowFar("preparing the text", total, say)
        before = sum(_stat(path)[1] for path in training)
        todo = chunks([(False, read(training)), (True, read(validation, before))], ENCODE)
        for chunk in itertools.islice(todo, building.chunks):
            progress.begin(chunk.at)
        if building.chunks:
            say(f"going on with what was prepared before, {progress.share(chunk.at):.0%} of the text")
        for chunk in todo if building.lost.wants(tokenizer) and not text.conversations else ():
            building.add(chunk, encoder.encode(chunk, building.lost))
            if not building.lost.wants(tokenizer):
                break
        large = _size([*training, *validation]) >= LARGE
        with contextlib.closing(_encoded(encoder, todo, large)) as parts:  # whatever happens here ends its processes
            for chunk, found in parts:
                building.add(chunk, found)
                progress.at(chunk.at)
        train, held = building.writers
        for writer in building.writers:
            writer.finish()
    if train.tokens == 0:
        raise UserError(everything_held_out(text) if held.tokens else EMPTY)
    notes += [note] if (note := building.lost.note()) else []
    notes += [building.copies.note()] if building.copies.count else []
    (part / NOTES).write_text(json.dumps(notes))
    shards = [open_shard(part / f"{side}.bin", tokenizer, whole=False)[0] for side in ("train", "validation")]
    if not text.conversations:
        np.packbits(overlap.repeated(*shards)).tofile(part / SEEN)
    (part / JOURNAL).unlink()
    seal(part, mode)


def seal(folder: Path, mode: int) -> None:
    """Gives the files of a folder this mode, and waits until all of it is on the disk."""
    for file in folder.iterdir():
        mode &= file.stat().st_mode  # the user's umask may take away more
        file.chmod(mode)
        _sync(file)
    folder.chmod(0o700 | mode | (mode & 0o444) >> 2)  # who may read the files may enter the folder
    _sync(folder)


def _kept_tokenizer(part: Path) -> Tokenizer | None:
    """The tokenizer of what is to be gone on with; None if there is nothing of this kind."""
    try:
        with untrusted.opened(part / JOURNAL) as file:
            return Tokenizer.load(part / "tokenizer.json", sha256=untrusted.parsed(file.readline())["tokenizer"])
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return None


def learnt(text: Text, say: Callable[[str], None], apart: frozenset[int] = frozenset()) -> Tokenizer:
    """The tokenizer of a text, which is trained if it is ours. apart: as `prepare` takes it."""
    if text.tokenizer == "bytes":
        return Tokenizer(BYTES)
    if text.tokenizer != "bpe":
        return Tokenizer.load(_users(text))
    return train_bpe(spoken([text], say, apart), text.vocab)


def spoken(texts: Sequence[Text], say: Callable[[str], None], apart: frozenset[int]) -> Iterator[str]:
    """The training documents of these texts without marks, from which a BPE learns.

    They are all pieces up to LEARNT bytes, and a sample of about that size of larger texts. That bounds the memory,
    since `tokenizers` counts every word. The sample depends on the content of pieces alone.
    """
    files = [sources(text)[0] for text in texts]
    share = LEARNT / max(sum(map(_size, files)), 1)
    progress, before = HowFar("training the tokenizer", sum(_stat(path)[1] for some in files for path in some), say), 0
    for text, training in zip(texts, files, strict=True):
        sides = rule(text, apart)
        for raw in read(training, before):
            progress.at(raw.at)
            for _, _, piece in sides.pieces(raw):
                digest = hash_of(piece)
                if sides.side(digest) == TRAIN and (share >= 1 or sides.sampled(digest, share)):
                    yield written(json.loads(piece)) if text.conversations else piece
        before += sum(_stat(path)[1] for path in training)


def _encoded(encoder: Encoder, todo: Iterator[Chunk], large: bool) -> Generator[tuple[Chunk, Part]]:
    """The parts of these chunks, in order, from processes if the text is large."""
    count = 1
    if large:
        from hvdllm.device import usable_cores  # it needs torch

        count = usable_cores()
    if count == 1:
        yield from ((chunk, encoder.encode(chunk)) for chunk in todo)
        return
    workers = Workers(encoder, count)
    try:
        yield from workers.encode(todo)
    finally:
        workers.close()


EMPTY = "the text is empty: text.path names files without a character"


def everything_held_out(text: Text) -> str:
    """The sentence for a text of which nothing is left to train on."""
    if text.validation is not None:
        return "text.path names nothing but the text of text.validation: give it other text to train on"
    return "all of the text is held out for validation: lower text.validation_share, or set text.validation"


class _Building:
    """The shards of a text while they are made, and the journal of what is done.

    Its first line has the sum of the tokenizer. Each other line says how many chunks are done, how large the shards
    were then, and the sums of what was added to them since the line before. Only what has these sums is gone on with.

    Attributes:
        writers: of each side.
        copies, lost: what was found so far.
        chunks: how many are done.
    """

    def __init__(self, part: Path, encoder: Encoder) -> None:
        self.writers = [_Writer(part / f"{side}.bin", encoder) for side in ("train", "validation")]
        self.copies, self.lost = Copies(), Lost()
        self.chunks = self._lines = self._new = 0
        self._journal = part / JOURNAL
        with untrusted.opened(self._journal) as file:
            kept = len(file.readline()) + sum(len(line) for line in file if self._adopts(line))
        os.truncate(self._journal, kept)
        for writer in self.writers:
            writer.cut()

    def _adopts(self, line: bytes) -> bool:
        """Goes on with what a line of the journal says, if the shards hold it. After a wrong line none is taken."""
        try:
            said = untrusted.parsed(line)
            if (said["encode"], said["line"]) != (ENCODE, self._lines):
                return False
            states = [_State(**state) for state in said["sides"]]
            found = [writer.holds(state) for writer, state in zip(self.writers, states, strict=True)]
            self.copies, self.lost = Copies(**said["copies"]), Lost(**said["lost"])
        except (ValueError, LookupError, TypeError, OSError):
            return False
        for writer, state, digest in zip(self.writers, states, found, strict=True):
            writer.adopt(state, digest)
        self.chunks, self._lines = said["chunks"], self._lines + 1
        return True

    def add(self, chunk: Chunk, part: Part) -> None:
        """Writes what the next chunk came to."""
        for side, run in part.runs.items():
            self.writers[side].add(run)
        if part.copies.count:
            self.copies.add(part.copies)
        self.chunks += 1
        self._new += chunk.size
        if self._new >= NOTED:
            sides = [dataclasses.asdict(writer.noted()) for writer in self.writers]
            line = {"encode": ENCODE, "line": self._lines, "chunks": self.chunks, "sides": sides}
            line |= {"copies": dataclasses.asdict(self.copies), "lost": dataclasses.asdict(self.lost)}
            with self._journal.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._lines, self._new = self._lines + 1, 0

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


@dataclass
class _State:
    """How much a shard has."""

    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    spelled: int = 0
    last: tuple[str, int] | None = None  # the last piece
    added: str = ""  # sha256 of what was written since the line before


class _Writer:
    """Writes a shard. The header is written last, so that a file that was cut short has none."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.write(bytes(HEADER))
        self._encoder = encoder
        self._hash, self._added = hashlib.sha256(), hashlib.sha256()
        self.state = _State()

    @property
    def tokens(self) -> int:
        return self.state.tokens

    def holds(self, state: _State) -> hashlib._Hash:
        """The hash of the file as far as a state says. Raises ValueError if what it has more than now is not that."""
        left = (state.tokens - self.tokens) * self._encoder.dtype.itemsize
        self._file.seek(HEADER + self.tokens * self._encoder.dtype.itemsize)
        whole, added = self._hash.copy(), hashlib.sha256()
        while left > 0 and (block := self._file.read(min(left, 2**20))):
            left -= len(block)
            whole.update(block)
            added.update(block)
        if left or added.hexdigest() != state.added:
            raise ValueError("the shard is not what was noted")
        return whole

    def adopt(self, state: _State, whole: hashlib._Hash) -> None:
        """Goes on from a state that the file holds."""
        self.state = dataclasses.replace(state, last=state.last and (state.last[0], state.last[1]))
        self._hash = whole

    def cut(self) -> None:
        """Leaves out of the file what was not adopted, and goes on at its end."""
        self._file.truncate(HEADER + self.tokens * self._encoder.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def add(self, run: Run) -> None:
        state, goes_on = self.state, joins(self.state.last, run.first)
        if state.documents and not goes_on and not self._encoder.rule.conversations:
            self._write(np.array([self._encoder.tokenizer.end], self._encoder.dtype).tobytes())
        self._write(run.ids)
        state.documents += run.documents - goes_on
        state.bytes, state.spelled, state.last = state.bytes + run.bytes, state.spelled + run.spelled, run.last

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._added.update(data)
        self.state.tokens += len(data) // self._encoder.dtype.itemsize

    def noted(self) -> _State:
        """The state, with the sum of what was written since this was last asked for."""
        self._file.flush()
        self.state.added, self._added = self._added.hexdigest(), hashlib.sha256()
        return self.state

    def close(self) -> None:
        """Closes the file, without a header unless finish() has written it."""
        self._file.close()

    def finish(self) -> None:
        """Writes the header."""
        shard = Shard(
            self._encoder.dtype.str,
            self.tokens,
            self.state.bytes,
            self.state.documents,
            self._encoder.tokenizer.vocab,
            self._encoder.tokenizer.hash,
            self._hash.hexdigest(),
            self.state.spelled,
            self._encoder.rule.conversations,
        )
        self._file.seek(0)
        self._file.write((MAGIC + json.dumps(dataclasses.asdict(shard)).encode()).ljust(HEADER - 1) + b"\n")
        self._file.close()


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
