"""Groups of processes: how they end, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvdllm.launch import group

# A launcher whose child hears no SIGTERM, in a session of its own as horovodrun's ranks are.
STUBBORN = """
import subprocess, sys, time
child = subprocess.Popen(["bash", "-c", "trap '' TERM; echo child $$; sleep 600"], start_new_session=True)
time.sleep(600)
"""


def sh(text: str) -> list[str]:
    return ["bash", "-c", text]


def test_all_is_well(tmp_path: Path) -> None:
    ended = group.run([sh("echo $A one"), sh("echo two >&2")], group.environment(A="x"), tmp_path / "log", 60.0)
    assert ended.problem is None and sorted(ended.tail) == ["two", "x one"]


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    ended = group.run(
        [sh("echo $$; exec sleep 600"), sh("sleep 0.3; echo why; exit 3")], os.environ, tmp_path / "l", 60.0
    )
    pid, why = ended.tail
    assert ended.problem == "ended with code 3" and why == "why" and not Path(f"/proc/{pid}").exists()


def test_one_that_fails_last(tmp_path: Path) -> None:
    assert group.run([sh("exit 4")], os.environ, tmp_path / "log", 60.0).problem == "ended with code 4"


def test_one_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "GRACE_S", 0.2)
    ended = group.run([[sys.executable, "-c", STUBBORN]], os.environ, tmp_path / "log", 2.0)
    (line,) = ended.tail
    assert ended.problem == "was not done after 2 s (--limit)"
    assert group.descendants([int(line.split()[1])]) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_but_interrupts_no_poll(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPython's Popen.poll takes a lock before it enters a try: an exception in between would keep it for ever."""
    poll, interrupted = subprocess.Popen.poll, list[int]()

    def signalled(self: subprocess.Popen[bytes]) -> int | None:
        if not (tmp_path / "log").read_text():  # it has not begun
            return poll(self)
        monkeypatch.setattr(subprocess.Popen, "poll", poll)
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            interrupted.append(number)
            raise
        return poll(self)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "poll", signalled)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            group.run([sh("echo $$; exec sleep 600")], os.environ, tmp_path / "log", 60.0)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert interrupted == [] and group.descendants([int((tmp_path / "log").read_text())]) == {}


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert group.run([sh(f"kill -HUP {os.getpid()}; echo x")], os.environ, tmp_path / "log", 60.0).tail == ["x"]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_last_words_are_those_of_ranks() -> None:
    text = (
        "[0]<stderr>:hvdllm: the disk is full\n\n[1]<stdout>:x\nTraceback (most recent call last):\n  File launch.py\n"
    )
    assert group.last_lines(text) == ["[0]<stderr>:hvdllm: the disk is full", "[1]<stdout>:x"]
    assert group.last_lines("a\nb\nc\n", most=2) == ["b", "c"]
