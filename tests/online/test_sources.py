"""Sources of a stream: each document once, from explicit places, and what cannot be read is set aside."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis_server import Server

from hvdllm.errors import UserError
from hvdllm.online import sources
from hvdllm.online.sources import Source, Taken
from hvdllm.text.parts import Stream


def made(said: list[str] | None = None, **settings: Any) -> Source:
    found = sources.made(Stream(**settings), (said if said is not None else []).append)
    found.begin([])
    return found


def read(source: Source, count: int, limit_s: float = 10.0) -> tuple[list[str], list[Taken]]:
    """So many documents, or as many as come."""
    texts: list[str] = []
    taken, end = [], time.monotonic() + limit_s
    while len(texts) < count and time.monotonic() < end:
        taken.append(source.read(0.05))
        texts += taken[-1].texts
        if taken[-1].over:
            break
    return texts, taken


# ------------------------------------------------------------------ replay
def test_a_text_is_played_once_and_goes_on_behind_a_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.txt").write_text(f"{name}{number}")
    paths = [str(tmp_path / "b"), str(tmp_path / "a")]
    texts, taken = read(made(path=paths, rate=0.0), 99)
    assert texts == [f"{name}{number}" for name in "ba" for number in range(5)] and taken[-1].over
    again = sources.made(Stream(path=paths, rate=0.0), print)
    again.begin([{"documents": 3}, {"documents": 7}])
    assert read(again, 99)[0] == texts[7:]


def test_a_rate_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text(f"{number}")
    now = [0.0]
    monkeypatch.setattr(sources.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    source = made(path=str(tmp_path), rate=10.0)
    counts = []
    for _ in range(40):
        before = now[0]
        counts.append(len(source.read(0.05).texts))
        now[0] = max(now[0], before + 0.05)
    assert now[0] == pytest.approx(2.0, abs=0.3) and 17 <= sum(counts) <= 23


# ------------------------------------------------------------------ folder
def test_a_folder_grows_by_lines_and_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SETTLED_S", 0.0)
    source = made(source="folder", path=str(tmp_path))
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "tw')
    assert read(source, 1)[0] == ["one"]
    with file.open("a") as out:
        out.write('o"}\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("a whole file\nof two lines")
    assert sorted(read(source, 2)[0]) == ["a whole file\nof two lines", "two"]
    with (tmp_path / "sub" / "b.txt").open("a") as out:
        out.write(" and more")
    texts, taken = read(source, 1)
    assert texts == [" and more"]
    again = sources.made(Stream(source="folder", path=str(tmp_path)), print)
    places = [{"files": {"a.jsonl": 16, "sub/b.txt": 4}}, {"files": {"a.jsonl": 32}}, taken[-1].at]
    again.begin(places)
    assert read(again, 1, 0.3)[0] == []


def test_a_file_that_still_changes_is_left_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SETTLED_S", 0.3)
    source = made(source="folder", path=str(tmp_path))
    file = tmp_path / "a.txt"
    for number in range(4):
        with file.open("a") as out:
            out.write(f"{number} not yet ")
        os.utime(
            file, (time.time() + 1e6 - number, time.time() + 1e6 - number)
        )  # a host whose clock is ahead, and jumps
        assert read(source, 1, 0.1)[0] == []
    assert read(source, 1)[0] == ["0 not yet 1 not yet 2 not yet 3 not yet "]


def test_what_cannot_be_read_is_set_aside_with_its_place(tmp_path: Path) -> None:
    rows = [b'{"text": "good"}', b'{"text": ', b'{"other": 1}', b'{"text": "\xff"}', b"[1]", b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    texts, taken = read(made(source="folder", path=str(tmp_path)), 2)
    aside = [each for one in taken for each in one.aside]
    assert texts == ["good", "last"] and len(aside) == 4
    assert [where.rsplit(" ", 1)[1] for where, _, _ in aside] == ["17", "27", "40", "54"]
    assert "JSON" in aside[0][1] and "no text under 'text'" in aside[1][1]
    told = [json.loads(line) for line in sources.told(aside).splitlines()]
    assert told[0]["begins"] == '{"text": '


def test_a_file_that_shrinks_is_said_and_only_what_is_added_is_read(tmp_path: Path) -> None:
    said: list[str] = []
    source = made(said, source="folder", path=str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert len(read(source, 2)[0]) == 2
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert read(source, 1, 0.3)[0] == [] and "shorter than what was read" in said[0]
    with (tmp_path / "a.jsonl").open("a") as out:
        out.write('{"text": "three"}\n')
    assert read(source, 1)[0] == ["three"]


def test_a_long_document_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST", 1000)
    monkeypatch.setattr(sources, "TOGETHER", 500)
    monkeypatch.setattr(sources, "LINE", 16_000)
    monkeypatch.setattr(sources, "SETTLED_S", 0.0)
    text = "".join(f"line {number} äöü\n" for number in range(300))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 5000}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "y" * 50_000}) + "\n" + '{"text": "after"}\n')
    source = made(source="folder", path=str(tmp_path))
    texts, taken = read(source, 99, 2.0)
    lines = [each for each in texts if each.startswith("line")]
    assert "".join(lines) == text and max(len(each.encode()) for each in lines) <= 1000
    assert "x" * 1000 in texts and "after" in texts
    assert sum(len(one.aside) for one in taken) >= 1  # the line of 50 kB is longer than 16 times a document


def test_a_line_of_any_length_takes_little_memory_and_is_set_aside_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: the rest of a line that is taken for lines of their own, a line that is read as a whole."""
    monkeypatch.setattr(sources, "LINE", 2**21)
    file = tmp_path / "a.jsonl"
    with file.open("wb") as out:
        out.write(b'{"text": "before"}\n{"text": "')
        for _ in range(64):
            out.write(b"x" * 2**20)
        out.write(b'"}\n{"text": "after"}\n')
    source = made(source="folder", path=str(tmp_path))
    tracemalloc.start()
    texts, taken = read(source, 2, 20.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["before", "after"] and peak < 2**24
    assert [(where.rsplit(" ", 1)[1], why) for one in taken for where, why, _ in one.aside] == [
        ("19", "its line is too long")
    ]


def test_a_pipe_with_a_line_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LINE", 2**18)
    out, into = os.pipe()
    with os.fdopen(out, "rb") as pipe, monkeypatch.context() as patch:
        patch.setattr(sources.sys, "stdin", pipe)
        source = made(source="stdin")

        def write() -> None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(into, "wb") as end:
                end.write(b'{"text": "before"}\n{"text": "' + b"x" * 2**22 + b'"}\n{"text": "after"}\n')

        thread = threading.Thread(target=write)
        thread.start()
        texts, taken = read(source, 2)
    thread.join()  # the pipe is closed, so it has an end
    assert texts == ["before", "after"] and sum(len(one.aside) for one in taken) == 1


# ------------------------------------------------------------------ Redis
@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any, Any]]:
    pytest.importorskip("redis")
    try:
        found = Server(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(str(error))

    def restart() -> None:
        found.kill()
        found.start()

    connect, clients = sources._client, []

    def connected(settings: Stream) -> tuple[Any, Any]:
        package, client = connect(settings)
        clients.append(client)
        return package, client

    monkeypatch.setattr(sources, "_client", connected)
    try:
        yield found.address, found.client, restart
    finally:
        for client in clients:
            client.close()
        found.close()


def test_a_stream_of_redis_is_read_once_and_goes_on_behind_a_place(server: tuple[str, Any, Any]) -> None:
    address, client, _ = server
    settings = Stream(source="redis", address=address, key="docs")
    source = sources.made(settings, print)
    source.begin([])
    assert source.read(0.05).nothing  # there is no such stream yet
    for number in range(300):
        client.xadd("docs", {"text": f"document {number}"})
    client.xadd("docs", {"other": "field"})
    texts, taken = read(source, 300)
    assert texts == [f"document {number}" for number in range(300)]
    assert [why for one in taken for _, why, _ in one.aside] == ["it has no field 'text'"]
    again = sources.made(settings, print)
    again.begin([{"id": "0-0", "count": 0}, taken[-1].at])
    client.xadd("docs", {"text": "later"})
    assert read(again, 1)[0] == ["later"] and read(again, 1, 0.3)[0] == []


def test_what_was_trimmed_before_it_was_read_is_counted(server: tuple[str, Any, Any]) -> None:
    address, client, _ = server
    source = sources.made(Stream(source="redis", address=address, key="docs"), print)
    source.begin([])
    for number in range(100):
        client.xadd("docs", {"text": f"document {number}"})
    assert len(read(source, 100)[0]) == 100
    for number in range(100, 200):
        client.xadd("docs", {"text": f"document {number}"})
    client.xtrim("docs", maxlen=40, approximate=False)
    texts, taken = read(source, 40)
    assert texts == [f"document {number}" for number in range(160, 200)] and sum(one.lost for one in taken) == 60


def test_large_and_small_documents_of_redis(server: tuple[str, Any, Any]) -> None:
    address, client, _ = server
    wanted = ["x" * 3_000_000, *(f"small {number}" for number in range(3000)), "ä" * 1_000_000, "last"]
    for text in wanted:
        client.xadd("docs", {"text": text})
    texts, taken = read(made(source="redis", address=address, key="docs"), len(wanted))
    assert texts == [wanted[0][: 2**20], *wanted[1:-2], "ä" * 2**19, "last"]
    assert max(len(one.texts) for one in taken) > 500


def test_a_server_that_has_lost_entries_is_said_and_nothing_is_read_twice(server: tuple[str, Any, Any]) -> None:
    address, client, _ = server
    said: list[str] = []
    source = made(said, source="redis", address=address, key="docs")
    for number in range(1, 6):
        client.xadd("docs", {"text": f"{number}"}, id=f"{number}-0")
    assert len(read(source, 5)[0]) == 5
    client.delete("docs")
    for number in range(1, 4):
        client.xadd("docs", {"text": f"{number}"}, id=f"{number}-0")
    assert read(source, 1, 0.3)[0] == []
    assert len(said) == 1 and "ends at 3-0 and was read up to 5-0" in said[0]
    client.xadd("docs", {"text": "6"}, id="6-0")
    assert read(source, 1)[0] == ["6"]


def test_what_was_trained_on_is_trimmed_and_is_no_gap(server: tuple[str, Any, Any]) -> None:
    address, client, _ = server
    settings = Stream(source="redis", address=address, key="docs", forget=True)
    source = sources.made(settings, print)
    source.begin([])
    ids = [client.xadd("docs", {"text": f"document {number}"}) for number in range(50)]
    _, taken = read(source, 50)
    source.forget({"id": ids[29].decode(), "count": 30})
    assert client.xlen("docs") == 20
    client.xadd("docs", {"text": "more"})
    texts, after = read(source, 1)
    assert texts == ["more"] and not sum(one.lost for one in after)
    keeps = sources.made(replace(settings, forget=False), print)
    keeps.forget(taken[-1].at)
    assert client.xlen("docs") == 21


def test_a_server_that_is_gone_is_said_once_and_asked_again(
    server: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, client, restart = server
    said: list[str] = []
    source = made(said, source="redis", address=address, key="docs")
    client.xadd("docs", {"text": "before"})
    assert read(source, 1)[0] == ["before"]
    client.shutdown(nosave=True)
    for _ in range(5):
        assert source.read(0.05).nothing
    restart()
    client.xadd("docs", {"text": "after"})
    assert read(source, 1)[0] == ["after"]
    assert len(said) == 2 and "does not answer" in said[0] and "answers again" in said[1]
    assert "secret" not in "".join(said)


def test_what_is_no_stream_is_one_sentence(server: tuple[str, Any, Any]) -> None:
    address, client, _ = server
    client.set("docs", "text")
    with pytest.raises(UserError, match=r"text\.key=docs is no stream"):
        made(source="redis", address=address, key="docs").read(0.05)
    with pytest.raises(UserError, match=r"refuses the password|REDIS_PASSWORD"):
        made(source="redis", address=address.replace(":secret@", ":wrong@"), key="docs").read(0.05)
    with pytest.raises(UserError, match="is no address"):
        made(source="redis", address="http://127.0.0.1", key="docs")
    with pytest.raises(UserError, match="there is no such folder"):
        made(source="folder", path="/nonexistent")


def test_entries_that_are_suddenly_large_do_not_take_all_memory(server: tuple[str, Any, Any]) -> None:
    """The reader's memory has a limit. Seen to catch: 48 entries of 2 MB in one answer, by which it dies again and
    again."""
    address, client, _ = server
    for number in range(200):
        client.xadd("documents", {"text": f"small {number}"})
    for number in range(48):
        client.xadd("documents", {"text": f"{number:02}" * 2**20})
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            now = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_DATA, (now + 70 * 2**20,) * 2)
            texts, _ = read(made(source="redis", address=address), 248, 50.0)
            code = 0 if [each[:2] for each in texts[200:]] == [f"{n:02}" for n in range(48)] else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
