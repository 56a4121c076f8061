"""The side channel of the heartbeats: files that stay readable, locks that end with their process, one verdict."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdllm.pulse import PAGE, Place, Pulse
from hvdllm.trainer.channel import SIZE, Channel, Peer, Verdict, opened, page_of, where
from hvdllm.trainer.judge import Beat

HOLD = """
import sys
from pathlib import Path
from hvdllm.trainer.channel import Channel
channel = Channel(Path(sys.argv[1]), 1)
print(channel.locks, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    made = Channel(tmp_path, 0)
    yield made
    made.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Rank 1, another process."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_beat_is_read_as_it_was_written(channel: Channel) -> None:
    beat = Beat(3, Place("exchange", 7, 9, "`grad.0`", 60.0), False, "words", 2)
    for each in (beat, Beat(4, Place("save", 8))):
        channel.tell(each)
        assert channel.heard(0) == each
        assert (channel.folder / "0").stat().st_size == SIZE
    channel.tell(Beat(5, words='"\\ä\n' * 5000))
    heard = channel.heard(0)
    assert heard is not None and heard.count == 5 and heard.words.startswith('"')
    assert (channel.folder / "0").stat().st_size == SIZE


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"place": 3}', '{"place": {"phase": 1}}', '{"place": {}, "x": 1}', " " * 2 * SIZE]
)
def test_a_file_that_is_no_beat_is_not_heard(channel: Channel, text: str) -> None:
    (channel.folder / "1").write_text(text)
    assert channel.heard(1) is None and channel.heard(2) is None


def test_a_link_or_a_pipe_is_not_heard(channel: Channel) -> None:
    os.mkfifo(channel.folder / "1")
    assert channel.heard(1) is None


def test_a_killed_process_is_gone_and_a_stopped_one_is_not(channel: Channel, other: subprocess.Popen[str]) -> None:
    assert not channel.gone(1)
    other.send_signal(signal.SIGSTOP)
    assert not channel.gone(1)
    other.kill()
    other.wait()
    assert channel.gone(1)
    assert not channel.gone(2), "it never was there"


def test_one_verdict_is_made(channel: Channel, tmp_path: Path) -> None:
    second = Channel(tmp_path, 2)
    text = json.dumps({"rank": 1, "hang": True, "text": "x"})
    assert channel.verdict(0) is None
    assert second.claim("verdict-0", text) and not channel.claim("verdict-0", "y") and not second.claim("verdict-0", "")
    assert channel.verdict(0) == Verdict(1, True, "x") and channel.verdict(1) is None
    second.close()


def test_a_page_stays_as_it_was_when_its_process_is_gone() -> None:
    rhythm = Pulse(60.0, 1800.0)
    page = page_of(rhythm)
    peer = Peer("host", where(), os.getpid(), "", True, page)
    there = opened(peer)
    assert there is not None
    rhythm.enter("forward")
    rhythm.wait("`grad.0`")
    os.close(page)
    assert rhythm.page is not None
    rhythm.page.close()
    step, phase, waits = PAGE.unpack(os.pread(there, PAGE.size, 0))
    assert (step, phase.rstrip(b"\0"), waits.rstrip(b"\0")) == (0, b"forward", b"`grad.0`")
    os.close(there)
    assert opened(Peer("host", "elsewhere", os.getpid(), "", True, page)) is None
    assert opened(Peer("host", where(), os.getpid(), "", True, -1)) is None


def test_a_full_disk_leaves_room_for_the_next_beat(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rewritten in place. Where even that fails, the caller hears of it."""
    channel.tell(Beat(1))
    inode = (channel.folder / "0").stat().st_ino
    channel.tell(Beat(2))
    assert (channel.folder / "0").stat().st_ino == inode

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError):
        channel.tell(Beat(3))
