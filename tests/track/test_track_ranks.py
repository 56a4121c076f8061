"""Many ranks and a tracker: one of them has it, and none imports its library."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import BATCH, HVDLLM, Job, launch, meddled, records, words_of

ROOT = Path(__file__).parents[2] / "hvdllm"
WORDS = ["track=wandb", "track.mode=offline"]


def env(tmp: Path) -> dict[str, str]:
    (tmp / "home").mkdir(exist_ok=True)
    return {"HOME": str(tmp / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "offline"}


def history(run: Path) -> list[float]:
    """Tokens of the training losses that W&B has, all lives together."""
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | env(run.parents[1]))
        items = [json.loads(line).get("history", {}).get("item", {}) for line in done.stdout.splitlines()]
        found += [item["tokens"] for item in items if "train/loss" in item]
    return found


@pytest.mark.ranks
def test_two_ranks_have_one_tracker(tmp_path: Path) -> None:
    with Job([*HVDLLM, "train", *words_of(tmp_path, "a", 6, *WORDS)], "gloo", 2, **env(tmp_path)) as job:
        assert job.wait().code == 0, job.out
        job.until_gone()
        assert job.out.count("W&B has an offline run") == 1
    run = tmp_path / "runs" / "a"
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    assert history(run) == [r["tokens"] for r in records(run, "commit")] == [BATCH * step for step in range(1, 7)]
    about = records(run, "run")[0]
    assert about["world"] == 2


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_rank_that_is_killed_takes_the_tracker_along(rank: int, tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 400, *WORDS)
    with Job(meddled(words, kill=[rank, 8], slow_s=0.3), "gloo", 2, **env(tmp_path)) as job:
        assert job.wait().code != 0
        job.until_gone()
    run = tmp_path / "runs" / "a"
    assert history(run) == [r["tokens"] for r in records(run, "commit")] and history(run)


@pytest.mark.ranks
def test_ctrl_c_of_the_launcher_ends_all_and_the_run_goes_on_as_the_same(tmp_path: Path) -> None:
    words, run = words_of(tmp_path, "a", 4000, *WORDS), tmp_path / "runs" / "a"
    with Job(meddled(words, slow_s=0.05), "real gloo", 2, **env(tmp_path)) as job:
        job.until(lambda: bool(list(run.glob("wandb/offline-run-*/*.wandb"))) and len(records(run, "commit")) > 3)
        job.signal(signal.SIGINT)
        job.wait()
        job.until_gone()
    at = records(run, "end")[-1]["tokens"]
    words = [f"budget_tokens={int(at) + 2 * BATCH}" if w.startswith("budget_tokens") else w for w in words]
    launch([*HVDLLM, "train", *words], "gloo", 2, **env(tmp_path))
    ids = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert len(ids) == 1 and len(list(run.glob("wandb/offline-run-*"))) == 2
    assert set(history(run)) == {r["tokens"] for r in records(run, "commit")}


@pytest.mark.thorough
@pytest.mark.ranks
def test_online_is_refused_on_all_ranks(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 6, "track=wandb", "track.mode=online")
    done = launch([*HVDLLM, "train", *words], "gloo", 2, code=None, **env(tmp_path))
    assert done.out.count("it has no key") == 1 and not records(tmp_path / "runs" / "a", "commit")


def test_who_imports_a_trackers_library() -> None:
    """What a rank imports of track/ is the run's end of it, which names neither."""
    users = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("wandb", "tensorboard") for name in names):
                users.add(path.relative_to(ROOT).as_posix())
    assert users == {"track/wandb.py", "track/tensorboard.py", "cli/track.py"}
    loaded = "import sys, hvdllm.trainer.life; print({m.split('.')[0] for m in sys.modules} & {'wandb', 'tensorboard'})"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout == "set()\n"
