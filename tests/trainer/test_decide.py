"""Going on from checkpoints: which one, and when there is nothing left to do."""

import os
import shutil
from pathlib import Path

import pytest
from torch import nn

from hvdllm import runs
from hvdllm.checkpoint import write
from hvdllm.config import compose
from hvdllm.errors import UserError
from hvdllm.exchange.base import State
from hvdllm.flat import Flat
from hvdllm.settings import Config
from hvdllm.trainer.resume import MAY_DIFFER, Start, asked, decide, refuse_differences
from hvdllm.world.single import SingleWorld


def config(folder: Path, *words: str) -> Config:
    return compose.compose([f"runs_dir={folder}", "name=a", "budget_tokens=1000", *words])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run stopped at 700 of 1,000 tokens, with checkpoints at 400 and 700."""
    folder = runs.Folder(tmp_path / "a")
    folder.create(config(tmp_path))
    folder.record("run", {"overrides": ["seed=0"]})
    for step in (4, 7):
        flat = Flat(nn.Linear(3, 2), 1, 1)
        state = State({"step": step, "tokens": 100 * step}, flat.pieces(0, 1), {"model": flat.x}, {})
        write.write(tmp_path / "a", flat, state, {}, SingleWorld(), 9)
    folder.record("end", {"reason": "stop", "tokens": 700})
    folder.close()
    return tmp_path


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_from_the_newest(made: Path, resume: str) -> None:
    start = decide(config(made, f"resume={resume}"), pytest.fail)
    assert start == Start(f"{made}/a", f"{made}/a/checkpoints/7", again=True)


def test_past_a_broken_one_which_is_named(made: Path) -> None:
    os.truncate(made / "a" / "checkpoints" / "7" / "state.json", 5)
    said: list[str] = []
    assert decide(config(made), said.append).checkpoint == f"{made}/a/checkpoints/4"
    assert len(said) == 1 and "checkpoints/7" in said[0]


def test_finished_is_a_matter_of_tokens(made: Path) -> None:
    assert decide(config(made, "budget_tokens=701"), pytest.fail).finished is None
    start = decide(config(made, "budget_tokens=700"), pytest.fail)
    assert start.finished is not None and "700 tokens of 700" in start.finished and start.checkpoint is None


def test_a_stop_without_a_checkpoint_finished_nothing(made: Path) -> None:
    for path in write.steps(made / "a"):
        shutil.rmtree(path)
    assert decide(config(made, "budget_tokens=700"), pytest.fail) == Start(f"{made}/a", again=True)


@pytest.mark.parametrize("name", sorted(set(MAY_DIFFER) - {"name", "runs_dir"}))
def test_each_of_those_that_may_differ_may(made: Path, name: str) -> None:
    word = {"resume": "resume=must", "data_dir": "data_dir=/x", "world": "world=single", "device": "device.threads=3"}
    word |= {"launch": "launch=slurm", "track": "track=wandb", "debug": "debug=faults", "on_hang": "on_hang=wait"}
    word |= {key: f"{key}=/elsewhere" for key in ("text.path", "text.validation")}
    if name == "text.path":  # of text=files alone
        old, new = (compose.compose(["text=files", f"text.path=/{where}"]) for where in ("here", "there"))
        return refuse_differences(old, new, made)
    assert decide(config(made, word.get(name, f"{name}=5000")), pytest.fail).checkpoint


def test_a_few_differences_are_named_with_both_values(made: Path) -> None:
    words = ["seed=1", "optim.lr=0.5", "schedule=wsd", "micro_batch=1"]
    with pytest.raises(UserError, match=r"seed was 0 and is now 1.*micro_batch was 16 and is now 1") as error:
        decide(config(made, *words), pytest.fail)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_a_runs_path(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    composed = asked(["resume=a", "keep=7"])[0]
    assert (composed.name, composed.keep, Path(composed.runs_dir).resolve()) == ("a", 7, made)
    with pytest.raises(UserError, match="not the folder of a run"):
        asked(["resume=must", "resume=b"])


def test_names_of_folders_are_taken_literally(tmp_path: Path) -> None:
    """A path may hold what Hydra reads as syntax."""
    folder = runs.Folder(tmp_path / "a,b [c]" / "lr=1")
    folder.create(config(tmp_path))
    folder.record("run", {"overrides": []})
    folder.close()
    composed, words = asked([f"resume={folder.path}"])
    assert Path(composed.runs_dir, composed.name or "") == folder.path
    assert asked(words) == (composed, words)  # in another process
