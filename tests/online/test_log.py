"""The log of a stream: what its index tells of is there, whatever dies, and it is in the log once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hvdllm.errors import UserError
from hvdllm.online import log
from hvdllm.online.log import INDEX, Entry, Log, Writer, segment

KIND = np.dtype(np.uint16)


def documents(*sizes: int, seed: int = 0) -> list[np.ndarray]:
    return [np.random.default_rng([seed, size]).integers(0, 1000, size).astype(np.uint16) for size in sizes]


def whole(folder: Path) -> np.ndarray:
    found = Log(folder, KIND)
    found.refresh()
    return found.tokens(0, found.last.tokens).copy()


def test_what_was_appended_is_read_also_over_the_ends_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to catch: a segment that is opened again at its start, a window that ends with its file."""
    monkeypatch.setattr(log, "SEGMENT", 10)
    writer, reader = Writer(tmp_path, KIND), Log(tmp_path, KIND)
    given = documents(3, 4, 30, 1, 12)
    for number in range(0, 5, 2):
        writer.append(part := given[number : number + 2], len(part), 5, {"id": number})
        (entry,) = reader.refresh()
        assert entry == writer.last and entry.at == {"id": number}
    writer.close()
    expected = np.concatenate(given)
    assert reader.last.tokens == 50 and reader.last.documents == 5 and reader.last.size == 15
    for first in range(50):
        for count in (1, 7, 50 - first):
            assert (reader.tokens(first, min(count, 50 - first)) == expected[first : first + count]).all()
    assert len(list(tmp_path.glob("tokens-*.bin"))) == 5


@pytest.mark.parametrize("left", ["no line", "half a line", "half the tokens", "other tokens", "a line too many"])
def test_the_next_writer_goes_on_where_the_last_whole_entry_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(log, "SEGMENT", 16)
    writer = Writer(tmp_path, KIND)
    writer.append(documents(10), 1, 20, {"id": 1})
    writer.append(documents(11, 12), 2, 40, {"id": 3})
    writer.close()
    index, tokens = tmp_path / INDEX, segment(tmp_path, 2)
    lines = index.read_bytes().splitlines(keepends=True)
    if left == "no line":
        index.write_bytes(lines[0])
    elif left == "half a line":
        index.write_bytes(lines[0] + lines[1][:-4])
    elif left == "half the tokens":
        tokens.write_bytes(b"")
    elif left == "other tokens":
        segment(tmp_path, 1).write_bytes(bytes(32))
    else:
        index.write_bytes(lines[0] + Entry(99, 9, 9, at={"id": 9}).line() + lines[1])
    again = Writer(tmp_path, KIND)
    assert again.last.at == {"id": 1} and again.last.tokens == 10
    again.append(documents(11, 12), 2, 40, {"id": 3})
    again.close()
    assert (whole(tmp_path) == np.concatenate(documents(10, 11, 12))).all()
    last = Writer(tmp_path, KIND)
    assert last.last.at == {"id": 3}
    last.close()


def test_a_full_disk_takes_the_whole_append_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path, KIND)
    writer.append(documents(10), 1, 20, {"id": 1})
    real = Entry.line

    def full(entry: Entry) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Entry, "line", full)
    with pytest.raises(OSError, match="No space"):
        writer.append(documents(5), 1, 10, {"id": 2})
    monkeypatch.setattr(Entry, "line", real)
    assert writer.last.at == {"id": 1}
    writer.append(documents(6), 1, 10, {"id": 2})
    assert (whole(tmp_path) == np.concatenate(documents(10, 6))).all()
    writer.close()


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    writer = Writer(tmp_path, KIND)
    with pytest.raises(UserError, match="another run writes to"):
        Writer(tmp_path, KIND)
    writer.close()
    Writer(tmp_path, KIND).close()


def test_a_log_of_somebody_else_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"tokens": "many"}\n')
    with pytest.raises(UserError, match="it is no log of this version"):
        Log(tmp_path, KIND).refresh()
    (tmp_path / INDEX).write_bytes(Entry(50, 1).line())
    found = Log(tmp_path, KIND)
    found.refresh()
    with pytest.raises(UserError, match="copy the log again"):
        found.tokens(0, 50)
