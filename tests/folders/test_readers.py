"""Trackers, sweeps and progress lines read folders too: a stranger's links, pipes and values do nothing there."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hvdllm import runs
from hvdllm.cli import track
from hvdllm.config import compose
from hvdllm.errors import UserError
from hvdllm.launch import base, local, progress, sweep, watched
from hvdllm.track import parts as trackers
from hvdllm.track import process, wandb


def test_a_checkpoint_that_is_uploaded_is_the_runs_own(tmp_path: Path) -> None:
    """Whatever path a record names; records of earlier lives are sent too, and may be a stranger's."""
    for name in ("run/checkpoints/3", "secret"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / name.replace("/", "-")).write_text("x")
    (tmp_path / "run/checkpoints/4").symlink_to(tmp_path / "secret")
    sent: list[Any] = []
    said: list[str] = []

    class Run:
        def log(self, values: Any, step: int) -> None: ...

        def log_artifact(self, artifact: Any) -> None:
            sent.append(artifact)

    tracker = object.__new__(wandb.Tracker)
    tracker.settings, tracker.folder, tracker.id = trackers.Wandb(checkpoints=True), tmp_path / "run", "abc"
    tracker.run, tracker.rows, tracker.say = Run(), [], said.append
    record = {"kind": "save", "tokens": 1, "path": str(tmp_path / "secret")}
    tracker.record(0, {**record, "step": 3})
    assert [list(artifact.manifest.entries) for artifact in sent] == [["run-checkpoints-3"]]
    with pytest.raises((OSError, ValueError)):
        tracker.record(1, {**record, "step": 4})
    assert len(sent) == 1


def test_what_is_synced_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "-run"
    for name in ("offline-run-1-a", "offline-run-2-b", "offline-run-3-c"):
        (folder / "wandb" / name).mkdir(parents=True)
    (folder / "wandb/offline-run-1-a/run-a.wandb").write_text("mine")
    (tmp_path / "other.wandb").write_text("another's")
    (folder / "wandb/offline-run-2-b/run-b.wandb").symlink_to(tmp_path / "other.wandb")
    os.mkfifo(folder / "wandb/offline-run-3-c/run-c.wandb")
    monkeypatch.chdir(tmp_path)
    (found,) = track.lives(Path("-run"))
    assert found == folder / "wandb/offline-run-1-a" and str(found).startswith("/")  # no flag of `wandb sync`


def test_a_log_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "launch.log").symlink_to("precious")
    with pytest.raises(UserError, match="is a link"):
        local.appended_to(tmp_path / "launch.log")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_progress_line_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    seen = watched.Watched(tmp_path)
    seen.look()
    assert seen.tokens == 0
    assert progress.pass_on(tmp_path / "metrics.jsonl", 0) == 0
    assert sweep.last_sentence(tmp_path / "metrics.jsonl", 0) == ""


@pytest.mark.parametrize(
    "text", ["[" * 99_999, "{}", '{"points": 3}', '{"points": [{"name": 3, "words": [1, null]}]}', '{"points": [{}]}']
)
def test_a_sweep_of_another_form_is_no_sweep(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    one = sweep.Sweep(["seed=0,1"], None, print)
    one.folder = tmp_path
    one.write()
    assert all(isinstance(word, str) for point in json.loads((tmp_path / "sweep.json").read_text())["points"]
               for word in point["words"])  # fmt: skip


def test_records_of_another_form_are_passed_over(tmp_path: Path) -> None:
    folder = runs.Folder(tmp_path / "a")
    folder.create(compose.compose(["name=a", f"runs_dir={tmp_path}"]))
    for tokens in (7, "many", [1], None, 1e400):
        folder.record("commit", {"tokens": tokens, "seconds": "x" if tokens == "many" else 1.0})
    folder.record("end", {"reason": "budget", "tokens": "all", "eval_loss": {}})
    folder.close()
    task = sweep.Task(base.Point("a", str(tmp_path), ()), runs.read_config(folder.path), ())
    sweep.read_end(task)
    assert task.tokens in (0, 7) and task.loss is None
    sweep.judge(task, 0, False, "")
    assert task.state == "failed"


def test_a_tracker_gets_no_sums(tmp_path: Path) -> None:
    folder = runs.Folder(tmp_path)
    folder.record("commit", {"tokens": 7, "loss": 1.0})
    folder.close()
    assert process.parsed((tmp_path / "metrics.jsonl").read_text()) == {"kind": "commit", "tokens": 7, "loss": 1.0}
