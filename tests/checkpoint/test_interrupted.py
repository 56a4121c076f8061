"""A checkpoint whose writing or deleting is cut short at any place, and disks that refuse."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from hvdllm.checkpoint import read, write
from hvdllm.errors import RunError, UserError
from hvdllm.exchange.base import State
from hvdllm.flat import Flat
from hvdllm.world.single import SingleWorld


class Killed(BaseException):
    """Nothing after it runs, as after SIGKILL."""


def flat() -> Flat:
    return Flat(nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 3)), 2, 100)


def save(folder: Path, step: int, value: float, keep: int = 9) -> None:
    own = flat()
    own.x.fill_(value)
    write.write(folder, own, State({"step": step}, own.pieces(0, 1), {"model": own.x}, {}), {}, SingleWorld(), keep)


def newest_value(folder: Path) -> tuple[str, float]:
    path = read.newest(folder, lambda text: None)
    assert path is not None
    own = flat()
    values = {float(own.view(n, read.share_vector(path, "model", own, SingleWorld())).mean()) for n in own.at}
    (value,) = values
    return path.name, value


def kill_at(call: int, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """The process ends at this call of a function, before it has done anything."""
    real, calls = getattr(module, name), iter(range(1, 99))

    def killing(*args: Any, **more: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*args, **more)

    monkeypatch.setattr(module, name, killing)


# The renames: state.json, manifest.json, then (where a folder of that step is there) it aside, the new one in place.
@pytest.mark.parametrize(
    ("name", "call", "left"),
    [
        *[("replace", 1, "old"), ("replace", 2, "old"), ("replace", 3, "old"), ("replace", 4, "before")],
        ("fsync", 1, "old"),
        ("fsync", 3, "old"),
    ],
)
def test_killed_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, left: str) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    with monkeypatch.context() as patch:
        kill_at(call, patch, os, name)
        with pytest.raises(Killed):
            save(tmp_path, 2, 2.5)
    assert newest_value(tmp_path) == {"old": ("2", 2.0), "before": ("1", 1.0)}[left]
    save(tmp_path, 2, 3.0)
    assert newest_value(tmp_path) == ("2", 3.0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_killed_after_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was moved aside is still there: it must not stand in the way of the next one."""
    save(tmp_path, 1, 1.0)
    with monkeypatch.context() as patch:
        kill_at(3, patch, shutil, "rmtree")  # the first two clear what an earlier life may have left
        with pytest.raises(Killed):
            save(tmp_path, 1, 2.0)
    assert (tmp_path / "checkpoints" / ".1.old").exists() and newest_value(tmp_path) == ("1", 2.0)
    save(tmp_path, 1, 3.0)
    assert newest_value(tmp_path) == ("1", 3.0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_killed_while_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, step)
    with monkeypatch.context() as patch:
        kill_at(1, patch, shutil, "rmtree")
        with pytest.raises(Killed):
            write.prune(tmp_path, 1, tmp_path / "checkpoints" / "3")
    assert read.broken(tmp_path / "checkpoints" / "1") == "manifest.json is missing"
    assert newest_value(tmp_path) == ("3", 3.0)
    write.prune(tmp_path, 1, tmp_path / "checkpoints" / "3")
    assert [path.name for path in write.steps(tmp_path)] == ["3"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    save(tmp_path, 1, 1.0)

    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(RunError, match=r"checkpoint of step 2.*No space left") as said:
        save(tmp_path, 2, 2.0, keep=1)
    assert "\n" not in str(said.value)
    with pytest.raises(RunError, match=r"cannot write .*/final .*No space left"):
        write.write_final(tmp_path, flat(), torch.zeros(999))
    assert newest_value(tmp_path) == ("1", 1.0)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_an_error_of_ours_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "save_file", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 1, 1.0)


def test_the_weights_to_keep_are_named_whole_and_replaced(tmp_path: Path) -> None:
    own, read_back = flat(), flat()
    for value in (1.0, 2.0):
        own.x.fill_(value)
        path = write.write_final(tmp_path, own, own.x)
        vector = torch.zeros_like(own.x)
        read.read_vector(path, "", read_back, vector)
        assert all(bool((own.view(name, vector) == value).all()) for name in own.at)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_rank_whose_replica_rank_0_hands_out_writes_nothing(tmp_path: Path) -> None:
    class Second(SingleWorld):
        rank, size = 1, 2

    own = flat()
    assert write.write(tmp_path, own, State({"step": 1}, [], {"model": own.x}, {}), {}, Second(), 1) is None
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused_by_the_tensor_that_differs(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    other = Flat(nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 4)), 1, 1e9)
    with pytest.raises(UserError, match=r"`model/1.weight` has 21 elements"):
        read.read_vector(tmp_path / "checkpoints" / "1", "model", other, other.x)
    with pytest.raises(UserError, match=r"`m/0.weight` has 0 elements"):
        read.read_vector(tmp_path / "checkpoints" / "1", "m", flat(), torch.zeros(999))


def test_the_newest_is_the_largest_number_and_other_names_are_none(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step, step)
    for name in (".101", "102.tmp", "1e9", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_value(tmp_path) == ("100", 100.0)
    assert [path.name for path in write.steps(tmp_path)] == ["9", "10", "100"]
    assert read.newest(tmp_path / "nowhere", pytest.fail) is None


def test_an_older_checkpoint_that_is_damaged_does_not_count_among_those_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by an earlier life of the run, so that this process knows nothing of them."""
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    monkeypatch.setattr(write, "_WHOLE", set())
    damaged = tmp_path / "checkpoints" / "2" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    write.prune(tmp_path, 2, tmp_path / "checkpoints" / "3")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert newest_value(tmp_path) == ("1", 1.0)
