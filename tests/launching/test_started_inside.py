"""What is started inside: it imports what the command imports, and is said to have stopped where it has."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvdllm.cli import train
from hvdllm.config.compose import compose
from hvdllm.errors import STOPPED, UserError
from hvdllm.interpreter import PYTHON
from hvdllm.launch import local, slurm, sweep
from hvdllm.launch.base import STOP_FILE, Point, command
from hvdllm.launch.progress import pass_on
from hvdllm.world.detect import Place


def test_a_file_of_the_users_shadows_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """python -m puts the folder first. Seen to catch: a random.py that is imported instead of Python's."""
    for name in ("random", "json", "types", "subprocess"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')\n")
    monkeypatch.chdir(tmp_path)
    words = [*PYTHON, "hvdllm", "--version"]
    assert local.run(words, os.environ, tmp_path / "log", threading.Event(), lambda pid, mark: None) == 0
    assert "hvdllm " in (tmp_path / "log").read_text()
    point = Point("a", "runs", ("seed=1",))
    assert command(point)[1:3] == ["-P", "-m"] and "-P -m hvdllm.launch.inside" in slurm.text_of(point, Slurm(), [])


def Slurm() -> Any:
    from hvdllm.launch.parts import Slurm as Settings

    return Settings()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*choose another runs_dir"):
        local.run(["true"], os.environ, tmp_path / "file" / "x" / "log", threading.Event(), lambda pid, mark: None)


def write(folder: Path, *records: dict[str, Any]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_stop_is_one_of_this_life(tmp_path: Path) -> None:
    """horovodrun returns 1 whatever its ranks return. Seen to catch: the stop of the life before."""
    assert not sweep.stopped_since(tmp_path, 0)
    write(tmp_path, {"kind": "run"}, {"kind": "end", "reason": "stop"})
    assert sweep.lives(tmp_path) == 1 and sweep.stopped_since(tmp_path, 0) and not sweep.stopped_since(tmp_path, 1)
    write(tmp_path, {"kind": "run"})
    assert not sweep.stopped_since(tmp_path, 1), "it was killed"
    write(tmp_path, {"kind": "end", "reason": "failed"})
    assert not sweep.stopped_since(tmp_path, 1)


@pytest.mark.parametrize(("reason", "code", "shown"), [("stop", 0, STOPPED), ("stop", 1, STOPPED), ("budget", 0, 0)])
def test_the_records_say_that_a_run_was_stopped(
    reason: str, code: int, shown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: horovodrun that returns 0 after Ctrl-C."""

    def launch(point: Point, *rest: object) -> int:
        point.folder.mkdir()
        write(point.folder, {"kind": "run"}, {"kind": "end", "reason": reason})
        return code

    monkeypatch.setattr(sweep, "launcher_of", lambda settings: SimpleNamespace(launch=launch))
    monkeypatch.setattr(sweep, "prepare", lambda config: None)
    words = ["launch=horovodrun", "launch.np=2", f"runs_dir={tmp_path}", "name=a"]
    assert sweep.one(compose(words), words) == shown


def test_the_tokens_of_a_stop_are_left_where_a_job_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    train.tell_of_stop(704)
    assert (tmp_path / "stop").read_text() == "704\n"
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "no" / "stop"))
    train.tell_of_stop(704)  # a full disk is no reason to fail
    assert 2 < STOPPED < 128


def test_rank_0s_lines_are_passed_on_without_their_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a read ends within a prefix."""
    log, at = tmp_path / "log", 0
    text = "[0]<stdout>:def f():\n[0]<stdout>:    pass [0]<stdout>:\n[1]<stderr>:two\n[1,0]<stdout>:x\nplain\n[0]<std"
    for cut in (*range(0, len(text), 7), len(text)):
        log.write_text(text[:cut])
        at = pass_on(log, at)
    pass_on(log, at, rest=True)
    assert capsys.readouterr().out == "def f():\n    pass [0]<stdout>:\n[1]<stderr>:two\nx\nplain\n[0]<std"


@pytest.mark.parametrize(
    ("env", "place", "cores"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "16"}, Place("srun", 0, 4, 0, 4), 16),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "16", "SLURM_STEP_NUM_TASKS": "4"},
         Place("horovodrun", 0, 4, 0, 4), 16),  # how=gloo: ranks are srun's tasks
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "16", "SLURM_STEP_NUM_TASKS": "1"},
         Place("horovodrun", 0, 4, 0, 4), None),  # a horovodrun within one task
        ({"SLURM_CPUS_PER_TASK": "16"}, Place("srun", 0, 4, 0, 4), None),  # of the batch script
        ({}, Place(), None),
    ],
)  # fmt: skip
def test_cores_that_srun_gave_a_rank(
    env: dict[str, str], place: Place, cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if re.match("SLURM_", name)]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert train.cores_of_task(place) == cores
