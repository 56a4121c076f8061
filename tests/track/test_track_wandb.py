"""W&B without a server: its files read back, over two lives of a run, and how it ends with the run. Nothing here
reaches a network: the server is a closed port of this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from launch import BATCH, HVDLLM, Job, environment, launch, meddled, records, words_of

from hvdllm.errors import STOPPED

OFFLINE = ["track=wandb", "track.mode=offline"]
NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
KEY = {"WANDB_API_KEY": "a" * 40}


def env(tmp: Path, **more: str) -> dict[str, str]:
    """A home of its own, so that no key of the user's is found and what is written there is seen."""
    (tmp / "home").mkdir(exist_ok=True)
    return {"HOME": str(tmp / "home"), "WANDB_DIR": str(tmp / "elsewhere"), "WANDB_MODE": "online", **NOWHERE, **more}


def lives(run: Path) -> list[list[dict[str, Any]]]:
    """All that W&B wrote, one list for each time the run was started."""
    found = []
    for path in sorted(run.glob("wandb/*run-*/"), key=lambda p: p.name):
        (written,) = path.glob("*.wandb")
        found.append([json.loads(line) for line in inspected(path, written.stat().st_mtime_ns).splitlines()])
    return found


@cache
def inspected(path: Path, written: int) -> str:
    """What W&B's own reader says of a folder, once for all who ask while nothing more is written."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(path), "--json"]
    home = environment(**env(path.parents[1].parent))
    return subprocess.run(command, capture_output=True, text=True, check=True, env=home).stdout


def of(life: list[dict[str, Any]], kind: str) -> list[Any]:
    return [one[kind] for one in life if one["type"] == kind]


def steps(life: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(one["step"]["num"], one["item"]) for one in of(life, "history")]


def summary(life: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in of(life, "summary"):
        found |= one.get("update", {})
    return found


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was killed at step 5 and went on from its checkpoint at step 2; and what its second life printed."""
    tmp = tmp_path_factory.mktemp("twice")
    more = ["launch.sweep=race", f"save_every={2 * BATCH}", f"sample_every={2 * BATCH}"]
    more = [*OFFLINE, *more, "track.tags=[night,two]", f"eval_every={3 * BATCH}", "track.checkpoints=true", "keep=9"]
    words = words_of(tmp, "twice", 7, *more)
    # Checkpoints of steps 2 and 4; the newer is spoilt, as by a power cut.
    launch_killed(words, tmp)
    (tmp / "runs" / "twice" / "checkpoints" / "4" / "state.json").unlink()
    done = launch([*HVDLLM, "train", *words], **env(tmp))
    return tmp / "runs" / "twice", done.out


def launch_killed(words: list[str], tmp: Path) -> None:
    with Job(meddled(words, kill=[0, 5], slow_s=0.2), **env(tmp)) as job:
        assert job.wait().code == -signal.SIGKILL
        job.until_gone()


def test_both_lives_are_one_run_and_nothing_is_lost(twice: tuple[Path, str]) -> None:
    run, _ = twice
    first, second = lives(run)
    about = [of(life, "run")[0] for life in (first, second)]
    assert about[0]["run_id"] == about[1]["run_id"] == json.loads((run / "track.json").read_text())["wandb"]["id"]
    numbers = [number for life in (first, second) for number, _ in steps(life)]
    assert numbers == sorted(set(numbers))
    losses = {item["tokens"]: item["train/loss"] for _, item in steps(second) if "train/loss" in item}
    assert losses == {r["tokens"]: r["loss"] for r in records(run, "commit") if r["tokens"] > 2 * BATCH} | {
        2 * BATCH: losses[2 * BATCH]
    }
    before = [item["tokens"] for _, item in steps(first) if "train/loss" in item]
    assert before == [BATCH * step for step in range(1, 5)]  # the kill came before the fifth was known
    evals = {item["tokens"]: item["eval/loss"] for _, item in steps(second) if "eval/loss" in item}
    assert evals == {r["tokens"]: r["loss"] for r in records(run, "eval")} and len(evals) == 3
    assert any(item.get("event/what", "").startswith("resumed from") for _, item in steps(second))


def test_tokens_are_the_axis(twice: tuple[Path, str]) -> None:
    for life in lives(twice[0]):
        axes = {one["glob_name"]: one["step_metric"] for one in of(life, "metric") if "glob_name" in one}
        assert {"train/*", "eval/*"} <= set(axes) and set(axes.values()) == {"tokens"}
        assert all("tokens" in item for _, item in steps(life))


def test_what_the_run_is(twice: tuple[Path, str]) -> None:
    run, _ = twice
    life = lives(run)[1]
    about = of(life, "run")[0]
    said = {key: about[key] for key in ("project", "display_name", "run_group", "tags")}
    assert said == {"project": "hvdllm", "display_name": "twice", "run_group": "race", "tags": ["night", "two"]}
    config = about["config"]["update"]
    assert config["optim"]["name"] == "adamw" and config["budget_tokens"] == 7 * BATCH
    (later,) = (one["update"]["run"] for one in of(life, "config") if "run" in one.get("update", {}))
    assert later["data_hash"] == records(run, "run")[-1]["data_hash"] and "config" not in later
    assert not [one for one in life if "git" in json.dumps(one.get("run", {}).get("git", {}))]


def test_how_each_life_ended(twice: tuple[Path, str]) -> None:
    run, _ = twice
    first, second = lives(run)
    assert of(first, "exit") == [{"exit_code": 1}] or of(first, "exit")[0]["exit_code"] == 1
    assert of(second, "exit")[0].get("exit_code", 0) == 0
    end = records(run, "end")[-1]
    found = summary(second)
    assert found["end/reason"] == "budget" and found["end/loss"] == end["loss"] and found["end/tokens"] == end["tokens"]


def test_samples_are_a_table(twice: tuple[Path, str]) -> None:
    run, _ = twice
    tables = sorted(run.glob("wandb/*run-*/files/media/table/*.json"), key=lambda path: path.stat().st_mtime_ns)
    last = json.loads(tables[-1].read_text())
    want = [[r["tokens"], r["text"]] for r in records(run, "sample")]
    assert last["columns"] == ["tokens", "text"] and last["data"] == want and len(want) == 4


def test_checkpoints_are_artifacts_if_asked(twice: tuple[Path, str]) -> None:
    found = [[one for one in of(life, "artifact") if one["type"] == "model"] for life in lives(twice[0])]
    artifacts = found[1]
    assert [len(each) for each in found] == [2, 3]  # steps 2 and 4; 4, 6 and 7
    names = {entry["path"] for entry in artifacts[0]["manifest"]["contents"]}
    assert "state.json" in names


def test_it_writes_into_the_runs_folder_and_says_one_thing(twice: tuple[Path, str]) -> None:
    run, out = twice
    tmp = run.parents[1]
    assert not (tmp / "elsewhere").exists() and not [p for p in (tmp / "home").rglob("*") if "wandb" in str(p)]
    said = [line for line in out.splitlines() if "W&B" in line or "wandb" in line.lower()]
    assert said == [f"W&B has an offline run: `hvdllm track sync {run}` sends it to the server"]
    assert "Traceback" not in (run / "track.log").read_text()  # what W&B prints goes there


def test_a_checkpoint_that_is_gone_costs_a_sentence(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 6, *OFFLINE, "track.checkpoints=true", "keep=1", f"save_every={BATCH}")
    done = launch([*HVDLLM, "train", *words], **env(tmp_path))  # over before W&B has started
    assert "checkpoints/1 was deleted before W&B had it" in done.out and "did not take" not in done.out
    (life,) = lives(tmp_path / "runs" / "a")
    assert len([item for _, item in steps(life) if "save/step" in item]) == 6
    assert [one for one in of(life, "artifact") if one["type"] == "model"]


# ------------------------------------------------------------------ without a server
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "it has no key"),
        (KEY, "http://127.0.0.1:9 gave no run within 1 s"),
        pytest.param({"WANDB_MODE": "disabled"}, "WANDB_MODE=disabled", marks=pytest.mark.thorough),
    ],
)
def test_without_a_server_it_stays_offline_and_says_why(more: dict[str, str], says: str, tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 3, "track=wandb", "track.start_s=1")
    done = launch([*HVDLLM, "train", *words], **env(tmp_path, **more))
    said = [line for line in done.out.splitlines() if "W&B" in line]
    assert len(said) == 2 and said[0].startswith("W&B stays offline: ") and says in said[0]
    (life,) = lives(tmp_path / "runs" / "a")
    assert [item["tokens"] for _, item in steps(life) if "train/loss" in item] == [BATCH, 2 * BATCH, 3 * BATCH]


def test_online_is_refused_before_training(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 3, "track=wandb", "track.mode=online")
    done = launch([*HVDLLM, "train", *words], code=2, **env(tmp_path))
    assert done.out.splitlines()[-1].startswith("hvdllm: track.mode=online, but W&B cannot start: it has no key")
    assert not records(tmp_path / "runs" / "a", "commit")
    words[-1] = "track.mode=auto"  # and the folder can be gone on with
    launch([*HVDLLM, "train", *words], **env(tmp_path))


def test_ctrl_c_reaches_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 2000, *OFFLINE), slow_s=0.05), **env(tmp_path)) as job:
        job.until(lambda: len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1 and len(records(run, "commit")) > 2)
        job.signal(signal.SIGINT)
        assert job.wait().code == STOPPED
        job.until_gone()
    assert records(run, "end")[-1]["reason"] == "stop"
    (life,) = lives(run)
    assert summary(life)["end/reason"] == "stop" and of(life, "exit")[0].get("exit_code", 0) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (KEY, "http://127.0.0.1:9 does not answer"),
        ({"WANDB_BASE_URL": "nonsense"}, "does not answer"),
    ],
)
def test_sync_says_in_one_sentence_why_not(more: dict[str, str], says: str, twice: tuple[Path, str]) -> None:
    run, _ = twice
    done = launch([*HVDLLM, "track", "sync", str(run)], code=1, **env(run.parents[1], **more))
    assert says in done.out and done.out.count("\n") == 1


def test_sync_of_what_is_no_tracked_run(tmp_path: Path) -> None:
    done = launch([*HVDLLM, "track", "sync", str(tmp_path)], code=2, **env(tmp_path))
    assert "has no W&B files" in done.out and done.out.count("\n") == 1
