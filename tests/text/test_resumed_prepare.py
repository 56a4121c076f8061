"""A large text: the same tokens from any number of processes and after any kill, and what is kept meanwhile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hvdllm.errors import RunError, UserError
from hvdllm.text import shards, workers
from hvdllm.text.encode import Chunk, Encoder, Part
from hvdllm.text.parts import Chat, Files, Text
from hvdllm.text.progress import HowFar
from hvdllm.text.shards import JOURNAL, Corpus, prepare
from hvdllm.text.tokenize import Tokenizer

SILENT = lambda text: None  # noqa: E731


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one piece and of several, text and lines of .jsonl, of which one is also validation text."""
    folder = tmp_path_factory.mktemp("books")
    draw = np.random.default_rng(0)
    for n in range(12):
        (folder / f"{n:02}.txt").write_text("".join(f"{n} größer {draw.integers(99)}\n" for _ in range(200)))
    (folder / "long.txt").write_text("".join(f"{n} → {n * n}\n" for n in range(12_000)))
    lines = (json.dumps({"text": f"line {n} " * (n % 40 + 1)}) for n in range(600))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "said.jsonl").write_text("")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, a line of the journal for each two of them, and two processes for every text."""
    monkeypatch.setattr(shards, "ENCODE", 20_000)
    monkeypatch.setattr(shards, "NOTED", 30_000)
    monkeypatch.setattr(shards, "LARGE", 1)
    monkeypatch.setattr("hvdllm.device.usable_cores", lambda: 2)


def kinds(books: Path) -> list[Text]:
    """Documents, documents of which some are validation text too, and conversations."""
    talk = books / "said.jsonl"
    if not talk.stat().st_size:
        rows = ({"prompt": f"what is {n}?", "completion": f"it is {n * n}"} for n in range(4_000))
        talk.write_text("\n".join(map(json.dumps, rows)))
    text = Files(
        path=[str(books / "*.txt"), str(books / "rows.jsonl")], tokenizer="bpe", vocab=300, validation_share=0.2
    )
    apart = dataclasses.replace(text, tokenizer="bytes", validation=[str(books / "03.txt"), str(books / "rows.jsonl")])
    return [text, apart, Chat(path=str(talk), tokenizer="bytes", validation_share=0.2)]


def content(corpus: Corpus) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corpus.folder.iterdir()}


@pytest.mark.parametrize("kind", range(3))
def test_any_number_of_processes_gives_the_same_files(
    books: Path, tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = kinds(books)[kind]
    one = prepare(text, tmp_path / "one", say=SILENT)
    monkeypatch.setattr(shards, "LARGE", 1)
    monkeypatch.setattr(shards, "ENCODE", 20_000)
    monkeypatch.setattr("hvdllm.device.usable_cores", lambda: 2)
    assert content(prepare(text, tmp_path / "two", say=SILENT)) == content(one)
    left = [path for path in Path("/proc").glob("[0-9]*/stat") if f") Z {os.getpid()} " in path.read_text()]
    assert not left, "no process is left behind"


@pytest.mark.parametrize("kind", range(3))
def test_a_killed_one_goes_on_and_gives_the_same_files(
    books: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """It is ended after each chunk but the last, again and again, until it comes through."""
    text = kinds(books)[kind]
    whole = prepare(text, tmp_path / "whole", say=SILENT)
    monkeypatch.setattr(shards, "LARGE", 2**60)
    encoded, lines, ends = 0, list[str](), 0
    encode = Encoder.encode

    def counted(self: Encoder, chunk: Chunk, lost: object = None) -> Part:
        nonlocal encoded
        encoded += 1
        if encoded % 4 == 0:
            raise KeyboardInterrupt
        return encode(self, chunk, lost)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr(shards, "train_bpe", once(shards.train_bpe))
    for _ in range(200):
        try:
            found = prepare(text, tmp_path / "data", say=lines.append)
            break
        except KeyboardInterrupt:
            ends += 1
            (part,) = (tmp_path / "data").glob("*.part")
            for shard in part.glob("*.bin"):  # what was written after the last line is no harm
                with shard.open("ab") as file:
                    file.write(b"half a tok")
    assert content(found) == content(whole) and ends >= 2
    assert sum("going on with what was prepared before" in line for line in lines) >= ends - 1
    assert not list((tmp_path / "data").glob("*.part"))


def once(function: object) -> object:
    calls = itertools.count()

    def only(*args: object) -> object:
        assert next(calls) == 0, "called again"
        return function(*args)  # type: ignore[operator]

    return only


def interrupted(text: Text, data_dir: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    """Prepares so many chunks of a text; the folder of what is left."""
    encode, encoded = Encoder.encode, itertools.count()

    def stop(self: Encoder, chunk: Chunk, lost: object = None) -> Part:
        if next(encoded) == after:
            raise KeyboardInterrupt
        return encode(self, chunk, lost)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "LARGE", 2**60)
        patch.setattr(Encoder, "encode", stop)
        prepare(text, data_dir, say=SILENT)
    (part,) = data_dir.glob("*.part")
    return part


def test_only_what_has_its_sums_is_gone_on_with(
    books: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = kinds(books)[1]
    whole = content(prepare(text, tmp_path / "whole", say=SILENT))

    monkeypatch.setattr(shards, "LARGE", 2**60)

    def flip(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    for number, damage in enumerate(
        [
            lambda part: flip(part / "train.bin", shards.HEADER + 3),
            lambda part: flip(part / "train.bin", -5000),
            lambda part: os.truncate(part / "validation.bin", shards.HEADER + 5),
            lambda part: (part / "train.bin").unlink(),
            lambda part: (part / JOURNAL).write_text((part / JOURNAL).read_text()[:-30]),
            lambda part: (part / JOURNAL).write_text('{"encode": 1}\nno json\n'),
            lambda part: flip(part / "tokenizer.json", 5),
            lambda part: (part / "tokenizer.json").unlink(),
        ]
    ):
        part = interrupted(text, tmp_path / f"data{number}", monkeypatch, 8)
        assert len((part / JOURNAL).read_text().splitlines()) >= 3
        damage(part)
        assert content(prepare(text, tmp_path / f"data{number}", say=SILENT)) == whole, number


def test_a_worker_that_is_killed_is_one_sentence_and_work_goes_on(
    books: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = kinds(books)[0]
    add = shards._Building.add
    started: list[workers.Workers] = []
    begin = workers.Workers.__init__

    def seen(self: workers.Workers, *args: object) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        started.append(self)

    def kill(self: object, *args: object) -> None:
        add(self, *args)  # type: ignore[arg-type]
        if self.chunks == 4:  # type: ignore[attr-defined]
            for process in started[0]._all:
                process.send_signal(signal.SIGKILL)

    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"has ended \(killed by signal 9\): free memory"),
    ):
        patch.setattr(workers.Workers, "__init__", seen)
        patch.setattr(shards._Building, "add", kill)
        prepare(text, tmp_path / "data", say=SILENT)
    assert all(process.poll() is not None for process in started[0]._all)
    said: list[str] = []
    found = prepare(text, tmp_path / "data", say=said.append)
    assert content(found) == content(prepare(text, tmp_path / "whole", say=SILENT))
    assert any("going on" in line for line in said)


PROCESS = """
import sys
from pathlib import Path
from hvdllm.text import shards
from hvdllm.text.parts import Files
shards.ENCODE, shards.NOTED, shards.LARGE = 20_000, 30_000, 1
import hvdllm.device
hvdllm.device.usable_cores = lambda: 2
add, slow = shards._Building.add, len(sys.argv) > 3
def wait(self, *args):
    add(self, *args)
    if slow and self.chunks == 6:
        print("here", flush=True)
        sys.stdin.read()
shards._Building.add = wait
text = Files(path=sys.argv[1].split(), tokenizer="bpe", vocab=300, validation_share=0.2)
shards.prepare(text, Path(sys.argv[2]), say=lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_real_one_that_is_ended_takes_its_workers_along_and_goes_on(
    books: Path, tmp_path: Path, number: signal.Signals
) -> None:
    text = kinds(books)[0]
    assert isinstance(text, Files) and isinstance(text.path, list)
    words = [sys.executable, "-c", PROCESS, " ".join(text.path), str(tmp_path / "data")]
    with subprocess.Popen([*words, "slow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while run.stdout.readline().strip() != "here":
            assert run.poll() is None
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.send_signal(number)
        run.wait(60)
    assert len(children) == 2
    while any(_runs(pid) for pid in children):
        time.sleep(0.05)
    assert list((tmp_path / "data").glob(f"*.part/{JOURNAL}"))
    again = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert "going on with what was prepared before" in again.stdout
    assert content(prepare(text, tmp_path / "data", say=SILENT)) == content(prepare(text, tmp_path / "e", say=SILENT))


def _runs(pid: str) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_worker_says_of_a_bad_line_names_it(tmp_path: Path, small: None) -> None:
    rows = [json.dumps({"text": f"row {n} " * 300}) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"txt": 1}']))
    with pytest.raises(UserError, match=r"a\.jsonl:61 has no field 'text'"):
        prepare(Files(path=str(tmp_path / "a.jsonl"), tokenizer="bytes"), tmp_path / "data", say=SILENT)
    assert not list((tmp_path / "data").glob("*.part")), "a line that is corrected makes another text"


def test_a_process_that_cannot_start_is_one_sentence(
    books: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PYTHON", (str(tmp_path / "none"),))
    with pytest.raises(RunError, match="cannot be started"):
        prepare(kinds(books)[0], tmp_path / "data", say=SILENT)
    monkeypatch.setattr(workers, "PYTHON", (sys.executable, "-c", "1", "-m"))
    with pytest.raises(RunError, match=r"has ended \(exit code 0\)"):
        prepare(kinds(books)[0], tmp_path / "data", say=SILENT)


def test_unfinished_work_of_others_is_kept_for_a_week(
    books: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, other = kinds(books)[:2]
    part = interrupted(text, tmp_path / "data", monkeypatch, 8)
    prepare(other, tmp_path / "data", say=SILENT)
    assert part.is_dir()
    os.utime(part / JOURNAL, (time.time() - shards.KEPT - 9,) * 2)
    prepare(dataclasses.replace(other, validation_share=0.3), tmp_path / "data", say=SILENT)
    assert not part.exists()


def test_a_full_disk_keeps_nothing(books: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = kinds(books)[0]
    part = interrupted(text, tmp_path / "data", monkeypatch, 8)
    monkeypatch.setattr(shards._Writer, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="No space left"):
        prepare(text, tmp_path / "data", say=SILENT)
    assert not part.exists()


def test_what_is_in_memory_does_not_grow_with_the_text(books: Path, small: None, tmp_path: Path) -> None:
    """No more chunks are read ahead than two for each process."""
    read = done = 0
    encoder = Encoder(shards.rule(kinds(books)[1]), shards.Tokenizer(shards.BYTES), None)

    def todo() -> Iterator[Chunk]:
        nonlocal read
        for chunk in shards.chunks([(False, shards.read(sorted(books.glob("*.txt"))))], 4_000):
            read += 1
            yield chunk

    pool = workers.Workers(encoder, 2)
    try:
        for _ in pool.encode(todo()):
            done += 1
            assert read <= done + 4
    finally:
        pool.close()
    assert read == done > 20


def test_a_bpe_of_a_large_text_is_trained_on_a_sample_by_content(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = kinds(books)[0]
    whole = prepare(text, tmp_path / "whole", say=SILENT)
    monkeypatch.setattr(shards, "LEARNT", 100_000)
    learnt: list[str] = []
    train_bpe = shards.train_bpe

    def seen(texts: Iterator[str], vocab: int) -> Tokenizer:
        learnt.extend(texts)
        return train_bpe(iter(learnt), vocab)

    monkeypatch.setattr(shards, "train_bpe", seen)
    some = prepare(text, tmp_path / "whole", say=SILENT)
    size = sum(len(piece.encode()) for piece in learnt)
    assert 30_000 < size < 200_000 < whole.train_bytes, "about as much as is asked for"
    assert some.folder != whole.folder and some.data_hash != whole.data_hash
    assert some.train_bytes == whole.train_bytes, "the sides stay"
    before, learnt[:] = sorted(learnt), []
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for n, path in enumerate(reversed(sorted([*books.glob("*.txt"), books / "rows.jsonl"]))):
        (renamed / f"{n:02}{path.suffix}").write_bytes(path.read_bytes())
    prepare(dataclasses.replace(text, path=str(renamed)), tmp_path / "else", say=SILENT)
    assert sorted(learnt) == before, "neither names nor order matter"
    assert prepare(text, tmp_path / "whole", say=SILENT, wanted=whole.data_hash).folder == whole.folder


def test_progress_is_said_every_five_seconds_and_later_more_rarely() -> None:
    now, lines = 0.0, list[str]()
    progress = HowFar("preparing the text", 400_000_000, lines.append, lambda: now)
    progress.begin(100_000_000)
    for tick in range(1, 3_600):
        now = float(tick)
        progress.at(100_000_000 + tick * 80_000)
    assert lines[0] == "preparing the text: 25% of 400 MB, 0.1 MB/s"
    assert 60 < len(lines) < 120
