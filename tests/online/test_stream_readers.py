"""Several readers of one stream: their logs are joined to one, in which each document is once, whatever dies."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_kit import MODEL, values
from redis_server import Server

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.errors import UserError
from hvdllm.online import readers
from hvdllm.online.joined import Joiner
from hvdllm.online.log import INDEX, Log, Writer, of_reader
from hvdllm.online.rounds import Layout, Rounds
from hvdllm.text.parts import Stream
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.world import virtual
from hvdllm.world.base import World
from hvdllm.world.single import SingleWorld

KIND = np.dtype(np.uint16)
LIMIT_S = 60.0


def texts_of(folder: Path) -> list[str]:
    """The documents of a log, in order."""
    log = Log(folder, KIND)
    log.refresh()
    tokens = log.tokens(0, log.last.tokens)
    return [
        Tokenizer(BYTES).decode(each[:-1]) for each in np.split(tokens, np.flatnonzero(tokens == 256) + 1) if len(each)
    ]


OPEN: list[Writer | Joiner] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes what a test has opened."""
    yield
    while OPEN:
        OPEN.pop().close()


class Part:
    """The log of one reader, by hand."""

    def __init__(self, folder: Path, number: int) -> None:
        self.writer, self.number = Writer(of_reader(folder, number), KIND), number
        OPEN.append(self.writer)

    def add(self, *texts: str, over: bool = False, bad: int = 0) -> None:
        ids = [np.append(Tokenizer(BYTES).encode([text])[0], 256) for text in texts]
        at = {"documents": self.writer.last.documents + len(texts)} | ({"over": True} if over else {})
        self.writer.append(ids, len(texts), sum(map(len, texts)), at, bad)


def joiner(folder: Path, said: list[str] | None = None, of: int = 2) -> Joiner:
    OPEN.append(found := Joiner(folder, KIND, of, 0.0, (said if said is not None else []).append))
    return found


def test_what_readers_append_is_joined_once_in_an_order_that_stays(tmp_path: Path) -> None:
    """Seen to catch: a piece that begins a token too late, an entry that is joined again after a restart, a piece over
    the end of a file."""
    parts, wanted = [Part(tmp_path, 0), Part(tmp_path, 1)], []
    for life in range(3):
        found = joiner(tmp_path)
        found.join()
        for k in (0, 1, 1, 0):
            texts = [f"life {life} of reader {k}, number {n}" for n in range(3)]
            parts[k].add(*texts, bad=k)
            found.join()
            wanted += texts
            assert texts_of(tmp_path) == wanted
        parts[life % 2].add("behind the last join")
        wanted += ["behind the last join"]
        found.close()
    joiner(tmp_path).join()
    assert texts_of(tmp_path) == wanted
    log = Log(tmp_path, KIND)
    log.refresh()
    assert log.last.documents == len(wanted) and log.last.size == sum(map(len, wanted)) and log.last.bad == 6
    whole = log.tokens(0, log.last.tokens)
    for first in range(0, log.last.tokens - 50, 7):
        assert np.array_equal(log.tokens(first, 50), whole[first : first + 50])


def test_it_is_over_when_all_readers_are_over(tmp_path: Path) -> None:
    parts, found, log = [Part(tmp_path, 0), Part(tmp_path, 1)], joiner(tmp_path), Log(tmp_path, KIND)
    for k in (1, 0):
        parts[k].add("last", over=True)
        found.join()
        log.refresh()
        assert bool(log.last.at.get("over")) == (k == 0)


def three_joined(folder: Path) -> Part:
    """The log of a reader whose three documents are joined, one by one. The other reader has none."""
    part, found = Part(folder, 0), joiner(folder)
    Part(folder, 1)
    for text in ("one", "two", "three"):
        part.add(text)
        found.join()
    found.close()
    return part


def test_a_line_that_a_kill_cut_short_is_joined_anew(tmp_path: Path) -> None:
    three_joined(tmp_path)
    os.truncate(tmp_path / INDEX, (tmp_path / INDEX).stat().st_size - 5)
    assert texts_of(tmp_path) == ["one", "two"]
    joiner(tmp_path).join()
    assert texts_of(tmp_path) == ["one", "two", "three"]


def test_a_reader_that_lost_its_newest_entries_reads_them_again(tmp_path: Path) -> None:
    """A host that loses power may lose what a joined log tells of. Its reader then takes the same text again, in other
    portions."""
    part = three_joined(tmp_path)
    part.writer.close()
    (of_reader(tmp_path, 0) / INDEX).write_bytes((of_reader(tmp_path, 0) / INDEX).read_bytes().split(b"\n")[0] + b"\n")
    part, found = Part(tmp_path, 0), joiner(tmp_path)
    found.join()
    part.add("two", "three", "four")
    found.join()
    assert texts_of(tmp_path) == ["one", "two", "three", "four"]


def test_a_full_disk_is_said_once_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    part, found = Part(tmp_path, 0), joiner(tmp_path, said)
    Part(tmp_path, 1)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(found._writer, "note", full)
        for text in ("one", "two"):
            part.add(text)
            found.join()
    assert len(said) == 1 and "training goes on" in said[0]
    found.join()
    assert texts_of(tmp_path) == ["one", "two"] and len(said) == 2 and "again" in said[1]


def test_an_index_that_is_wrong_is_one_sentence(tmp_path: Path) -> None:
    part, found = Part(tmp_path, 0), joiner(tmp_path)
    part.add("one")
    found.join()
    found.close()
    (line,) = (tmp_path / INDEX).read_text().splitlines()
    for change in ({"reader": 5000}, {"reader": "../x"}, {"first": -1}, {"reader": -1, "tokens": 99}):
        more = json.dumps(json.loads(line) | change)
        (tmp_path / INDEX).write_text(f"{line}\n{more}\n")
        with pytest.raises(UserError, match="cannot be read"):
            Log(tmp_path, KIND).refresh()
    (tmp_path / INDEX).write_text(f"{line}\n")
    with pytest.raises(UserError, match="another number of readers than text\\.readers=0"):
        Joiner(tmp_path, KIND, 0, 0.0, print)


# ------------------------------------------------------------------ runs
def trained(tmp_path: Path, *more: str, name: str = "a", code: int = 0) -> list[dict[str, Any]]:
    words = [
        "train", "text=stream", "text.tokenizer=bytes", "text.slice_tokens=1024", *MODEL, "batch_tokens=192",
        "budget_tokens=1920", f"name={name}", f"runs_dir={tmp_path}", f"data_dir={tmp_path / 'data'}",
        "device.threads=1", "log_every=192", "eval_every=960", "save_every=960", "sample_every=0", "text.wait_s=60",
        "schedule=constant", "schedule.warmup=0",
        *more,
    ]  # fmt: skip
    assert main(words) == code
    return list(runs.records(tmp_path / name)) if (tmp_path / name).exists() else []


def inbox(folder: Path, files: int, each: int = 40) -> list[str]:
    """Fills a folder, and returns its documents."""
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(files):
        texts = [f"file {number} of {folder.name}, line {line}: the quick brown fox" for line in range(each)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found += texts
    return found


def test_readers_deal_a_folder_on_all_hosts_and_any_ranks_learn_the_same(tmp_path: Path) -> None:
    """Seen to catch: a reader that takes all files, two hosts that start the same reader, a rank that sees no joined
    log."""
    wanted = inbox(tmp_path / "in", 12)
    source = ["text.source=folder", f"text.path={tmp_path / 'in'}", "text.readers=3"]
    four = trained(tmp_path, *source, "budget_tokens=9600", "world=virtual", "world.size=4", "world.hosts=2")
    log = tmp_path / "a" / "log"
    assert Counter(texts_of(log)) == Counter(wanted)
    assert all((of_reader(log, k) / INDEX).stat().st_size for k in range(3))
    still = ["text.source=log", f"text.path={log}"]
    one = trained(tmp_path, *still, "budget_tokens=9600", name="b")
    assert values(four, "tokens") == values(one, "tokens")
    assert values(four) == pytest.approx(values(one), rel=1e-9)
    assert main(["evaluate", str(tmp_path / "a")]) == 0


def test_a_run_with_readers_goes_on_exactly(tmp_path: Path) -> None:
    wanted = inbox(tmp_path / "in", 12)
    source = ["text.source=folder", f"text.path={tmp_path / 'in'}", "text.readers=2"]
    first = trained(tmp_path, *source, "budget_tokens=5760")
    trained(tmp_path, *source, "budget_tokens=11520")
    again = values(trained(tmp_path, *source, "budget_tokens=11520"))
    assert values(first) == again[: len(values(first))]
    whole = trained(tmp_path, "text.source=log", f"text.path={tmp_path / 'a' / 'log'}", "budget_tokens=11520", name="b")
    assert values(whole) == again
    assert Counter(texts_of(tmp_path / "a" / "log")) == Counter(wanted)


def test_each_reader_has_a_stream_of_redis_and_forgets_what_was_learnt(tmp_path: Path) -> None:
    """Seen to catch: a place of one reader that trims the stream of the other."""
    pytest.importorskip("redis")
    try:
        server = Server(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    try:
        for number in range(60):
            for reader in (0, 1):
                for _ in range(1 + reader):
                    server.client.xadd(f"news-{reader}", {"text": f"document {number} of reader {reader}"})
        source = ["text.source=redis", f"text.address={server.address}", "text.key=news-{reader}", "text.readers=2"]
        trained(tmp_path, *source, "text.forget=true", "budget_tokens=3840", "save_every=3840")
        entries = Log(tmp_path / "a" / "log", KIND).refresh()
        assert entries[-1].documents == 180
        layout = Layout(16, 64, 3)
        rounds = Rounds(tmp_path / "a" / "log")
        learnt = layout.place(rounds.get(3840 // 192 - 1)) * 16
        for reader in (0, 1):
            at = [entry.at["count"] for entry in entries if entry.reader == reader and entry.tokens <= learnt]
            assert server.client.xlen(f"news-{reader}") == 60 * (1 + reader) - at[-1]
    finally:
        server.close()


def test_a_text_is_played_by_several_readers_once(tmp_path: Path) -> None:
    wanted = inbox(tmp_path / "in", 3)
    source = ["text.source=replay", f"text.path={tmp_path / 'in'}", "text.readers=2", "text.rate=0"]
    trained(tmp_path, *source, "budget_tokens=1e9", code=75)  # until it is over
    assert Counter(texts_of(tmp_path / "a" / "log")) == Counter(wanted)


def test_a_reader_that_is_killed_is_started_again(tmp_path: Path) -> None:
    wanted = inbox(tmp_path / "in", 8, 200)
    log = tmp_path / "log"
    log.mkdir()
    Tokenizer(BYTES).save(tmp_path / "tokenizer.json")
    settings = Stream(source="folder", path=str(tmp_path / "in"), readers=2)
    found = readers.started(settings, log, tmp_path / "tokenizer.json", KIND, SingleWorld(), lambda text: None)
    assert found is not None
    try:
        os.kill(found._intakes[1]._process.pid, signal.SIGKILL)
        end = time.monotonic() + LIMIT_S
        while len(texts_of(log)) < len(wanted):
            assert time.monotonic() < end
            found.look()
            time.sleep(0.02)
    finally:
        found.close()
    assert Counter(texts_of(log)) == Counter(wanted)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["text.source=stdin"], "text.source=stdin has one reader"),
        (["text.source=redis"], "such as text.key=documents-{reader}"),
        (["text.path=[a,b]"], "a list of texts has one reader"),
        (["text.readers=0"], "text.readers"),
        (["text.readers=5000"], "text.readers"),
    ],
)
def test_what_readers_cannot_share_is_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, "text.readers=2", *words, code=2)
    assert sentence in capsys.readouterr().err


def test_another_number_of_readers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inbox(tmp_path / "in", 4)
    source = ["text.source=folder", f"text.path={tmp_path / 'in'}"]
    trained(tmp_path, *source, "text.readers=2")
    trained(tmp_path, *source, "text.readers=3", "budget_tokens=3840", code=2)
    assert "text.readers" in capsys.readouterr().err


class Started:
    """An intake that reads nothing."""

    def __init__(self, settings: Stream, folder: Path, tokenizer: Path, say: object, number: int, of: int) -> None:
        self.what = settings.path, folder.name, number, of

    def check(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("path", ["in", "in-{reader}"])
def test_the_first_rank_of_each_host_starts_its_readers(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: two hosts that start the same readers."""
    monkeypatch.setattr(readers, "Intake", Started)
    (tmp_path / path).mkdir()
    settings = Stream(source="folder", path=str(tmp_path / path), readers=3)

    def body(world: World) -> list[tuple[object, ...]] | None:
        found = readers.started(settings, tmp_path / "log", tmp_path / "tokenizer.json", KIND, world, print)
        if found is None:
            return None
        found.close()
        return [each.what for each in found._intakes.values()]  # type: ignore[attr-defined]

    (tmp_path / "log").mkdir()

    def what(k: int) -> tuple[object, ...]:
        own = str(tmp_path / path).replace("{reader}", str(k))
        return (own, f"reader-{k}", *((k, 3) if path == "in" else (0, 1)))

    assert virtual.run(4, body, hosts=2) == [[what(0), what(2)], None, [what(1)], None]


def test_a_folder_that_only_one_host_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Stream(source="folder", path=str(tmp_path), readers=2)
    monkeypatch.setattr(readers, "SAME_S", 0.0)
    looked = iter(range(1000))
    monkeypatch.setattr(readers, "_looked", lambda folder: [next(looked)])
    with pytest.raises(UserError, match="is not the same folder on all hosts: put"):
        virtual.run(2, lambda world: readers.hosts_of(settings, world), hosts=2)
