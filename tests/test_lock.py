"""One process at a time trains in a run's folder. Seen to catch: a lock that is never given back, one that a living
process loses, one that a dead process keeps, a pid that another process has by now, and a folder that is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hvdllm import lock, runs
from hvdllm.config.compose import compose
from hvdllm.errors import RunError, UserError
from hvdllm.lock import Lock
from hvdllm.trainer.resume import decide


def left(folder: Path, age: float = 0.0, **said: Any) -> None:
    """A lock of somebody else, last touched `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps({**lock.here(), **said}))
    at = time.time() - age
    os.utime(folder / lock.NAME, (at, at))


def gone() -> int:
    """The pid of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def test_the_second_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = Lock(tmp_path / "a")
    with pytest.raises(UserError, match=f"process {os.getpid()} on ") as error:
        Lock(tmp_path / "a")
    assert "\n" not in str(error.value) and first.intact() and lock.held(tmp_path / "a")
    first.close()
    assert not lock.held(tmp_path / "a")
    assert not (tmp_path / "a").exists(), "a folder that was made for the lock alone goes with it"
    second = Lock(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").touch()
    second.close()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["metrics.jsonl"]


HERE: dict[str, Any] = {}
ELSEWHERE = {"host": "another"}


@pytest.mark.parametrize(
    ("said", "age", "free"),
    [
        (HERE, 1e6, False),  # it lives, however long ago it was heard of: a stopped process is not gone
        ({"pid": None}, 0, False),
        ({"started": "1"}, 0, True),  # the pid is another process's by now
        ({"boot": "before"}, 0, False),
        ({"pids": "pid:[1]"}, 0, False),  # a pid of another container says nothing
        (ELSEWHERE, 10, False),
        (ELSEWHERE, lock.STALE_S + 10, True),
        ({**ELSEWHERE, "job": "7", "life": "0"}, 10, True),  # this job, requeued on another node
        ({**ELSEWHERE, "job": "7", "life": "1"}, 10, False),
        ({**ELSEWHERE, "job": "8"}, 10, True),  # Slurm says that it has ended
        ({**ELSEWHERE, "job": "9"}, 10, False),  # that it runs
        ({**ELSEWHERE, "job": "10"}, 10, True),  # that there is no such job
        ({**ELSEWHERE, "job": "--help"}, 10, False),  # nothing that scontrol is asked
    ],
)
def test_whose_lock_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], age: float, free: bool
) -> None:
    from hvdllm import squeue

    states = {"8": squeue.JobState("", "CANCELLED", "", 0), "9": squeue.JobState("", "RUNNING", "", 0), "10": None}
    monkeypatch.setattr(squeue, "ask", lambda job: states[job])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left(tmp_path / "a", age, **said)
    if free:
        Lock(tmp_path / "a").close()
    else:
        with pytest.raises(UserError, match="is in use"):
            Lock(tmp_path / "a")
        assert (tmp_path / "a" / lock.NAME).exists()
    assert not [file for file in (tmp_path / "a").iterdir() if file.name.startswith(".")]


def test_a_killed_process_leaves_no_lock_that_counts(tmp_path: Path) -> None:
    left(tmp_path / "a", pid=gone())
    assert not lock.held(tmp_path / "a")
    Lock(tmp_path / "a").close()


@pytest.mark.parametrize("content", ["", "[1]", "[" * 2000, "\xff" * 3])
def test_a_lock_that_says_nothing_counts_by_its_age(tmp_path: Path, content: str) -> None:
    (tmp_path / lock.NAME).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="is in use"):
        Lock(tmp_path)
    os.utime(tmp_path / lock.NAME, (1, 1))
    Lock(tmp_path).close()


def test_of_many_processes_one_gets_a_stale_lock(tmp_path: Path) -> None:
    left(tmp_path / "a", pid=gone())
    code = f"""if True:
    import sys, time
    from pathlib import Path
    from hvdllm.errors import UserError
    from hvdllm.lock import Lock
    try:
        Lock(Path({str(tmp_path / "a")!r}))
    except UserError:
        sys.exit(2)
    print("mine", flush=True)
    sys.stdin.read()"""
    many = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)
    ]
    said = []
    for process in many:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    for process in many:
        process.communicate()
    assert sorted(said) == [b"", b"", b"", b"mine\n"]
    assert sorted(process.returncode for process in many) == [0, 2, 2, 2]


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*choose another runs_dir"):
        Lock(tmp_path / "file" / "a")


@pytest.mark.parametrize("how", ["removed", "moved", "taken over"])
def test_a_run_ends_where_its_folder_is_no_longer_its_own(tmp_path: Path, how: str) -> None:
    held = Lock(tmp_path / "a")
    folder = runs.Folder(tmp_path / "a", held)
    config = compose([f"runs_dir={tmp_path}", "name=a"])
    folder.create(config)
    folder.record("run", {})
    if how == "removed":
        shutil.rmtree(folder.path)
    elif how == "moved":
        folder.path.rename(tmp_path / "b")
    else:
        (folder.path / lock.NAME).unlink()
        left(folder.path)
    for act in (lambda: folder.record("end", {}), lambda: folder.append("log.txt", "x"), folder.check):
        with pytest.raises(RunError, match="was removed, moved or taken over") as error:
            act()
        assert "\n" not in str(error.value)
    held.close()
    folder.close()
    assert (folder.path / lock.NAME).exists() == (how == "taken over"), "another process's lock is not ours to take"
    if how != "taken over":
        assert not folder.path.exists() and not decide(config, pytest.fail).again, "the name is free"


@pytest.mark.parametrize("name", ["lock", "log.txt", "launch.log", ".config.yaml.12", "checkpoints/.3/x"])
def test_what_a_kill_at_the_very_start_leaves_is_no_obstacle(tmp_path: Path, name: str) -> None:
    (tmp_path / "a" / name).parent.mkdir(parents=True)
    (tmp_path / "a" / name).touch()
    assert not decide(compose([f"runs_dir={tmp_path}", "name=a"]), pytest.fail).again


@pytest.mark.parametrize("name", [".git", "checkpoints/3/manifest.json", "metrics.jsonl"])
def test_what_is_somebody_elses_is(tmp_path: Path, name: str) -> None:
    (tmp_path / "a" / name).parent.mkdir(parents=True)
    (tmp_path / "a" / name).touch()
    with pytest.raises(UserError, match="is not the folder of a run"):
        decide(compose([f"runs_dir={tmp_path}", "name=a"]), pytest.fail)


def test_a_finished_run_needs_no_lock(tmp_path: Path) -> None:
    """It may be kept where nobody can write, or another process may look at it."""
    from contextlib import ExitStack

    from hvdllm.cli.display import Silent
    from hvdllm.trainer.agree import agreed_start
    from hvdllm.world.single import SingleWorld

    config = compose([f"runs_dir={tmp_path}", "name=a"])
    folder = runs.Folder(tmp_path / "a")
    folder.create(config)
    folder.close()
    other = Lock(tmp_path / "a")
    with ExitStack() as held, pytest.raises(UserError, match="is in use"):
        agreed_start(config, SingleWorld(), Silent(), held)
    folder.record("end", {"reason": "budget", "tokens": config.budget_tokens})
    folder.close()
    with ExitStack() as held:
        start, lock_here = agreed_start(config, SingleWorld(), Silent(), held)
    assert start.finished is not None and lock_here is None and other.intact()
    other.close()
    with ExitStack() as held:
        start, lock_here = agreed_start(config, SingleWorld(), Silent(), held)
        assert lock_here is not None and lock_here.intact()
    assert not (tmp_path / "a" / lock.NAME).exists()
