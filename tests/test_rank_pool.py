"""Ranks that the fork server starts are as those that a launcher starts: exit codes, output, signals, environment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from launch import HVDLLM, Job, launch, meddled, records, same_bits, words_of

pytestmark = pytest.mark.ranks
BOTH = pytest.mark.parametrize("how", ["alone", "real alone"])


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


@BOTH
def test_a_program_alone(how: str) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['FRUIT'], 'LEFT' in os.environ); os.kill"
    done = launch(python(code, "a b", ""), how, FRUIT="apple")
    assert done.out == f"['-c', 'a b', ''] {Path(__file__).parents[1]} apple False\n"
    for body, returned, says in (
        ("sys.exit(7)", 7, ""),
        ("sys.exit('no fruit')", 1, "no fruit\n"),
        ("sys.exit()", 0, ""),
        ("os._exit(3)", 3, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit; atexit.register(print, 'bye')", 0, "bye\n"),
        ("import threading; threading.Timer(0.1, print, ['late']).start()", 0, "late\n"),
    ):
        done = launch(python(f"import os, sys; {body}"), how, code=returned)
        assert done.out.endswith(says) and (says or not done.out), (body, done.out)


@BOTH
def test_ctrl_c_and_what_a_program_starts(how: str) -> None:
    # A shell has what it starts in the background ignore Ctrl-C, and this test may be started so.
    code = (
        "import signal, subprocess; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('here', flush=True); subprocess.run(['sleep', '600'])"
    )
    with Job(python(code), how) as job:
        job.until(lambda: "here" in job.out and len(job.pids()) == 2)
        os.kill(job.process.pid, signal.SIGINT)
        assert job.wait().code == -signal.SIGINT and "KeyboardInterrupt" in job.out
    assert not job.pids()


@pytest.mark.parametrize("how", ["gloo", "mpirun"])
def test_what_is_trained_and_how_a_rank_is_killed(how: str, tmp_path: Path) -> None:
    """Bit for bit what real ranks train; a kill, an interrupt and what is left reach launcher and test."""
    launch([*HVDLLM, "train", *words_of(tmp_path, "a", 4)], how, 2)
    launch([*HVDLLM, "train", *words_of(tmp_path, "b", 4)], f"real {how}", 2)
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    run = tmp_path / "runs" / "c"
    with Job(meddled(words_of(tmp_path, "c", 10_000), slow_s=0.02), how, 2) as job:
        job.until(lambda: len(records(run, "commit")) > 2)
        os.kill(job.rank(1), signal.SIGKILL)
        done = job.wait()
        job.until_gone()
    assert done.code == (1 if how == "gloo" else 137) and "signal 9" in done.out


def test_the_ranks_end_with_who_asked_for_them(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 10_000), slow_s=0.02), "gloo", 3) as job:
        job.until(lambda: len(records(run, "commit")) > 2)
        assert len(job.pids()) == 4 and job.rank(2) in job.pids()
        job.kill()
        assert job.process.wait(10) == -signal.SIGKILL
