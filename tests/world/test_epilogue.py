"""The last word is printed once the launcher has ended, and only where it can be."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdllm.world import epilogue
from hvdllm.world.detect import started


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that call themselves mpirun and tee; what they print goes to `out`."""
    with open(tmp_path / "out", "ab") as out:
        made = [
            subprocess.Popen(["bash", "-c", f"exec -a {name} sleep 600"], stderr=out) for name in ("mpirun", "tee")
        ]  # fmt: skip
    end = time.monotonic() + 60
    while any(b"sleep 600" in _words(each.pid) for each in made) and time.monotonic() < end:
        time.sleep(0.01)
    yield made
    for each in made:
        each.kill()
        each.wait()


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_last_word_comes_after_the_launchers(sleepers: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    mpirun, tee = sleepers
    ancestors = {each.pid: started(each.pid) for each in (mpirun, tee)}
    found = epilogue.launcher(ancestors)
    assert found == (mpirun.pid, ancestors[mpirun.pid]) and epilogue.launcher({tee.pid: ancestors[tee.pid]}) is None
    assert epilogue.start("hvdllm: rank 1 failed", *found)
    with open(tmp_path / "out", "a") as out:
        out.write("Traceback\n")
    assert mpirun.poll() is None and (tmp_path / "out").read_text() == "Traceback\n"
    mpirun.kill()
    mpirun.wait()
    end = time.monotonic() + 60
    while "failed" not in (tmp_path / "out").read_text() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "out").read_text() == "Traceback\nhvdllm: rank 1 failed\n"


def test_where_the_launchers_output_cannot_be_opened_nothing_is_started() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not epilogue.start("x", gone.pid, "1") and epilogue.launcher({gone.pid: "1"}) is None
