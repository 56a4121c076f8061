"""Prepared text: packing, counts, the checks on opening, and preparing under kills, rivals and full disks."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvdllm.errors import UserError
from hvdllm.text import shards
from hvdllm.text.parts import Files, Stdlib, Text
from hvdllm.text.shards import HEADER, MAGIC, Corpus, data_folder, open_shard, prepare
from hvdllm.text.tokenize import BYTES, Tokenizer, train_bpe

SILENT = lambda text: None  # noqa: E731


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """40 documents of different text, one of them of several pieces."""
    folder = tmp_path / "books"
    folder.mkdir()
    for n in range(39):
        (folder / f"{n:02}.txt").write_text(f"book {n}: größer\n" * (n + 1))
    (folder / "long.txt").write_text("".join(f"{n} → {n * n}\n" for n in range(10_000)))
    return folder


def settings(books: Path, **changes: object) -> Files:
    return dataclasses.replace(Files(path=str(books), tokenizer="bytes", validation_share=0.2), **changes)  # type: ignore[arg-type]


def split(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The documents between the end tokens."""
    ends = np.flatnonzero(tokens == tokenizer.end)
    return [tokenizer.decode(part[part != tokenizer.end]) for part in np.split(tokens, ends)]


# ------------------------------------------------------------------ what is in them
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_are_joined_with_one_end_token(books: Path, tmp_path: Path, tokenizer: str) -> None:
    text = settings(books, tokenizer=tokenizer, vocab=300, validation=str(books / "0*.txt"))
    corpus = prepare(text, tmp_path / "data", say=SILENT)
    files = sorted(books.iterdir())
    assert split(corpus.train, corpus.tokenizer) == [file.read_text() for file in files[10:]]
    assert split(corpus.validation, corpus.tokenizer) == [file.read_text() for file in files[:10]]
    assert (corpus.train_shard.documents, corpus.validation_shard.documents) == (30, 10)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bytes_are_counted_exactly(books: Path, tmp_path: Path, tokenizer: str) -> None:
    corpus = prepare(settings(books, tokenizer=tokenizer, vocab=300), tmp_path / "data", say=SILENT)
    whole = sum(file.stat().st_size for file in books.iterdir())
    assert corpus.train_bytes + corpus.validation_shard.bytes == whole
    for tokens, shard in ((corpus.train, corpus.train_shard), (corpus.validation, corpus.validation_shard)):
        assert corpus.tokenizer.token_bytes[tokens].sum() == shard.bytes > 0
        assert len(tokens) == shard.tokens
        assert int((tokens == corpus.tokenizer.end).sum()) == shard.documents - 1


def test_pieces_of_a_file_on_both_sides(books: Path, tmp_path: Path) -> None:
    for file in books.glob("[0-9]*"):
        file.unlink()
    corpus = prepare(settings(books, validation_share=0.5), tmp_path / "data", say=SILENT)
    assert corpus.train_shard.documents and corpus.validation_shard.documents
    text = (books / "long.txt").read_text()
    both = split(corpus.train, corpus.tokenizer) + split(corpus.validation, corpus.tokenizer)
    assert "".join(sorted(both, key=text.index)) == text


def test_the_tokens_are_a_memory_map(books: Path, tmp_path: Path) -> None:
    corpus = prepare(settings(books), tmp_path / "data", say=SILENT)
    assert corpus.train.dtype == np.uint16 and not corpus.train.flags.writeable and not corpus.train.flags.owndata
    assert corpus.folder.parent == tmp_path / "data"
    assert sorted(file.name for file in corpus.folder.iterdir()) == [
        "notes.json", "seen.bits", "tokenizer.json", "train.bin", "validation.bin",
    ]  # fmt: skip
    assert Tokenizer.load(corpus.folder / "tokenizer.json").hash == corpus.tokenizer.hash


def test_batches_of_documents_change_nothing(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path / "one", say=SILENT)
    monkeypatch.setattr(shards, "ENCODE", 1000)
    two = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path / "two", say=SILENT)
    assert one.data_hash == two.data_hash
    assert np.array_equal(one.train, two.train)


def test_a_bpe_is_trained_on_the_training_text_alone(books: Path, tmp_path: Path) -> None:
    text = settings(books, tokenizer="bpe", vocab=300, validation=str(books / "long.txt"))
    corpus = prepare(text, tmp_path, say=SILENT)
    assert corpus.tokenizer.hash == train_bpe((file.read_text() for file in sorted(books.glob("[0-9]*"))), 300).hash
    assert corpus.tokenizer.hash != train_bpe((file.read_text() for file in sorted(books.iterdir())), 300).hash


def test_notes_say_what_was_not_as_asked(books: Path, tmp_path: Path) -> None:
    (books / "long.txt").unlink()
    corpus = prepare(settings(books, tokenizer="bpe", vocab=30_000, validation_share=0.0), tmp_path, say=SILENT)
    fewer, nothing = corpus.notes
    assert f"{corpus.tokenizer.vocab:,} tokens, fewer than the 30,000" in fewer
    assert "held out" in nothing and len(corpus.validation) == 0
    assert prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path, say=SILENT).notes == []


# ------------------------------------------------------------------ made once
def said(text: Text, data_dir: Path) -> tuple[Corpus, list[str]]:
    lines: list[str] = []
    return prepare(text, data_dir, say=lines.append), lines


def test_prepared_once_and_again_when_anything_changes(books: Path, tmp_path: Path) -> None:
    first, lines = said(settings(books), tmp_path)
    assert len(lines) == 1 and str(first.folder) in lines[0]
    same, lines = said(settings(books), tmp_path)
    assert same.folder == first.folder and same.data_hash == first.data_hash and lines == []

    (books / "00.txt").write_text("another text\n")
    edited, lines = said(settings(books), tmp_path)
    assert edited.data_hash != first.data_hash and lines
    folders = {first.folder, edited.folder}
    for change in (
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "vocab": 300},
        {"validation_share": 0.5},
        {"validation": str(books / "01.txt")},
        {"path": str(books / "1*.txt")},
    ):
        corpus, lines = said(settings(books, **change), tmp_path)
        assert corpus.folder not in folders and lines
        folders.add(corpus.folder)


def test_data_hash_is_of_the_content_not_of_place_and_time(books: Path, tmp_path: Path) -> None:
    first = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path / "one", say=SILENT)
    books.rename(tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        os.utime(file, (1, 1))
    second = prepare(settings(tmp_path / "moved", tokenizer="bpe", vocab=300), tmp_path / "two", say=SILENT)
    assert first.folder.name != second.folder.name
    assert first.data_hash == second.data_hash
    other = prepare(settings(tmp_path / "moved", tokenizer="bpe", vocab=301), tmp_path / "two", say=SILENT)
    assert other.data_hash != first.data_hash


def test_a_users_tokenizer(books: Path, tmp_path: Path) -> None:
    trained = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path / "data", say=SILENT)
    path = tmp_path / "mine.json"
    trained.tokenizer.save(path)
    corpus = prepare(settings(books, tokenizer=str(path)), tmp_path / "data", say=SILENT)
    assert corpus.folder != trained.folder and corpus.data_hash == trained.data_hash
    with pytest.raises(UserError, match=r"text\.tokenizer=bpee is neither bytes nor bpe nor a file"):
        prepare(settings(books, tokenizer="bpee"), tmp_path / "data", say=SILENT)


def test_the_standard_library_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = prepare(Stdlib(tokenizer="bytes"), tmp_path, say=SILENT)
    assert 5e6 < corpus.train_bytes < 3e7
    assert 0.02 < corpus.validation_shard.bytes / corpus.train_bytes < 0.1
    monkeypatch.setattr(shards, "read", None)
    assert prepare(Stdlib(tokenizer="bytes"), tmp_path, say=SILENT).data_hash == corpus.data_hash, (
        "and only opened again"
    )


# ------------------------------------------------------------------ texts that give nothing
def test_texts_without_training_tokens(books: Path, tmp_path: Path) -> None:
    for share, match in ((1.0, "all of the text is held out"), (0.1, "the text is empty")):
        with pytest.raises(UserError, match=match):
            prepare(settings(books, validation_share=share), tmp_path / "data", say=SILENT)
        for file in books.iterdir():
            file.write_text("")
    assert [file.suffix for file in (tmp_path / "data").iterdir()] == [".lock", ".lock"]  # nothing half built


def test_a_text_that_changes_while_it_is_read(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = shards._build

    def edited(text: Text, part: Path, mode: int, say: Callable[[str], None], apart: frozenset[int]) -> None:
        build(text, part, mode, say, apart)
        (books / "00.txt").write_text("edited meanwhile")

    monkeypatch.setattr(shards, "_build", edited)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(settings(books), tmp_path / "data", say=SILENT)
    monkeypatch.undo()
    assert "edited meanwhile" in split(prepare(settings(books), tmp_path / "data", say=SILENT).train, Tokenizer(BYTES))


# ------------------------------------------------------------------ damage
def damaged(path: Path, match: str, text: Text, data_dir: Path) -> None:
    with pytest.raises(UserError, match=match) as caught:
        prepare(text, data_dir, say=SILENT)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_shard_is_named(books: Path, tmp_path: Path) -> None:
    text = settings(books)
    corpus = prepare(text, tmp_path / "data", say=SILENT)
    path = corpus.folder / "train.bin"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1001] ^= 1
    for data, match in [
        (bytes(flipped), "tokens are not those that were written"),
        (good[:-2], r"header promises .* its size is"),
        (good + b"\x00\x00", r"header promises .* its size is"),
        (b"PK" + good[2:], "does not begin like a token file"),
        (good[:100], "train.bin is damaged"),
        (b"", "train.bin is damaged"),
        (good[:20] + b"}" + good[21:], "train.bin is damaged"),
    ]:
        path.unlink()
        path.write_bytes(data)
        damaged(path, match + r".*delete the folder .*made anew", text, tmp_path / "data")
    path.unlink()
    damaged(path, "No such file", text, tmp_path / "data")
    path.write_bytes(good)
    prepare(text, tmp_path / "data", say=SILENT)
    (corpus.folder / "tokenizer.json").unlink()
    damaged(corpus.folder / "tokenizer.json", "cannot be read", text, tmp_path / "data")
    (corpus.folder / "tokenizer.json").write_text(json.dumps({"hvdllm": "other"}))
    damaged(corpus.folder / "tokenizer.json", "describes no tokenizer", text, tmp_path / "data")


def test_a_shard_that_does_not_go_with_the_tokenizer(books: Path, tmp_path: Path) -> None:
    bpe = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path, say=SILENT)
    with pytest.raises(UserError, match="made with another tokenizer"):
        open_shard(bpe.folder / "train.bin", Tokenizer(BYTES))
    wide = Tokenizer(bpe.tokenizer.json)
    wide.vocab = 65_537
    with pytest.raises(UserError, match="vocabulary of 65,537 tokens is larger than its uint16 can hold"):
        open_shard(bpe.folder / "train.bin", wide)
    narrow = Tokenizer(bpe.tokenizer.json)
    narrow.vocab = int(bpe.train.max())
    with pytest.raises(UserError, match=f"holds the token {narrow.vocab}, the tokenizer has only {narrow.vocab}"):
        open_shard(bpe.folder / "train.bin", narrow)


def test_a_large_shard_is_hashed_by_one_rank_of_a_host(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare(settings(books), tmp_path, say=SILENT)
    monkeypatch.setattr(shards, "VERIFY", 100)
    data = bytearray((corpus.folder / "train.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bent.bin").write_bytes(data)
    with pytest.raises(UserError, match="not those that were written"):
        open_shard(tmp_path / "bent.bin", corpus.tokenizer)
    open_shard(tmp_path / "bent.bin", corpus.tokenizer, whole=False)  # what the others know of it
    (tmp_path / "cut.bin").write_bytes(data[:-1])
    with pytest.raises(UserError, match="its size is"):
        open_shard(tmp_path / "cut.bin", corpus.tokenizer, whole=False)


def test_the_header_can_be_read_by_eye(books: Path, tmp_path: Path) -> None:
    data = (prepare(settings(books), tmp_path, say=SILENT).folder / "train.bin").read_bytes()
    assert data.startswith(MAGIC) and data[HEADER - 1 : HEADER] == b"\n"
    header = json.loads(data[len(MAGIC) : HEADER])
    assert header["dtype"] == "<u2" and header["tokenizer"] == Tokenizer(BYTES).hash


# ------------------------------------------------------------------ folders that cannot be written
@pytest.mark.parametrize("call", ["mkdir", "write", "sync", "rename"])
def test_a_full_disk_is_one_sentence(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = {
        "mkdir": (Path, "mkdir"),
        "write": (shards._Writer, "_write"),
        "sync": (os, "fsync"),
        "rename": (Path, "rename"),
    }[call]
    monkeypatch.setattr(*place, full)
    with pytest.raises(UserError, match=r"cannot be written to .*data \(No space left on device\).*data_dir=…"):
        prepare(settings(books), tmp_path / "data", say=SILENT)
    monkeypatch.undo()
    assert not [path for path in tmp_path.glob("data/*") if path.is_dir()]
    prepare(settings(books), tmp_path / "data", say=SILENT)


def test_a_data_dir_that_is_a_file(books: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*data \(File exists\)"):
        prepare(settings(books), tmp_path / "data", say=SILENT)


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data_folder(None) == tmp_path / ".cache" / "hvdllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder(None) == tmp_path / "cache" / "hvdllm"
    assert data_folder("~/shards") == tmp_path / "shards"


# ------------------------------------------------------------------ rivals and kills, with real processes
PROCESS = """
import sys, time
from pathlib import Path
from hvdllm.text.parts import Files
from hvdllm.text import shards
stop = sys.argv[3:]
if stop:
    here = getattr(shards, stop[0])
    def halt(*args, **kw):
        here(*args, **kw)
        print("here", flush=True)
        time.sleep(float(stop[1]))
    setattr(shards, stop[0], halt)
text = Files(path=sys.argv[1], tokenizer="bpe", vocab=300, validation_share=0.2)
corpus = shards.prepare(text, Path(sys.argv[2]), say=lambda line: print(line, flush=True))
print("done", corpus.data_hash, flush=True)
"""


def start(books: Path, data_dir: Path, *stop: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(books), str(data_dir), *stop], stdout=subprocess.PIPE, text=True
    )


def test_runs_that_start_together_prepare_once(books: Path, tmp_path: Path) -> None:
    runs = [start(books, tmp_path / "data", "_build", "0.3") for _ in range(3)]
    printed = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sum("preparing" in text for text in printed) == 1
    assert len({text.split("done ")[1] for text in printed}) == 1
    assert [path.suffix for path in sorted((tmp_path / "data").iterdir())] == ["", ".lock"]


@pytest.mark.parametrize("where", ["train_bpe", "_sync", "_build"])
def test_killed_at_any_moment_and_prepared_again(books: Path, tmp_path: Path, where: str) -> None:
    run = start(books, tmp_path / "data", where, "60")
    assert run.stdout is not None
    with run.stdout:
        while run.stdout.readline().strip() != "here":
            assert run.poll() is None
        waiting = start(books, tmp_path / "data")  # another run stands at the lock meanwhile
        assert waiting.stdout is not None
        assert "waiting" in waiting.stdout.readline()
        assert list((tmp_path / "data").glob("*.part"))
        assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir() and not path.suffix]
        run.send_signal(signal.SIGKILL)
        run.wait()
    printed = waiting.communicate(timeout=60)[0]
    assert waiting.returncode == 0 and "preparing" in printed and "done" in printed
    whole = prepare(
        Files(path=str(books), tokenizer="bpe", vocab=300, validation_share=0.2), tmp_path / "else", say=SILENT
    )
    assert f"done {whole.data_hash}" in printed
    assert not list((tmp_path / "data").glob("*.part"))


def test_what_a_killed_run_left_of_another_text_is_removed(books: Path, tmp_path: Path) -> None:
    left = tmp_path / "data" / "0123456789abcdef.part"
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"half")
    run = start(books, tmp_path / "data", "train_bpe", "60")  # a live one stays
    assert run.stdout is not None
    with run.stdout:
        while run.stdout.readline().strip() != "here":
            assert run.poll() is None
        assert not left.exists()
        live = list((tmp_path / "data").glob("*.part"))
        prepare(settings(books), tmp_path / "data", say=SILENT)
        assert live == list((tmp_path / "data").glob("*.part"))
        run.kill()
        run.wait()


def test_gz_is_read_twice_and_the_same(books: Path, tmp_path: Path) -> None:
    plain = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path / "data", say=SILENT)
    for file in list(books.iterdir()):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    packed = prepare(settings(books, tokenizer="bpe", vocab=300), tmp_path / "data", say=SILENT)
    assert packed.data_hash == plain.data_hash
