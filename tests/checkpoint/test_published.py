"""Publications: whatever is killed or refused, `latest` leads to whole weights."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_interrupted import Killed, flat, kill_at

from hvdllm import sums
from hvdllm.checkpoint import write
from hvdllm.errors import RunError


def publish(folder: Path, tokens: int, value: float) -> Path:
    own = flat()
    own.x.fill_(value)
    return write.publish(folder, tokens, own, own.x)


def value_of(path: Path) -> float:
    """The weights of a publication, which are whole, all equal, and those of their sum."""
    assert sums.changed(path / "model.safetensors", path) is None
    tensors = load_file(path / "model.safetensors")
    assert {*tensors} == {*flat().at}
    (value,) = {float(x) for tensor in tensors.values() for x in tensor.unique()}
    return value


def latest(folder: Path) -> float:
    return value_of(folder / "published" / "latest")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "published").iterdir())


def test_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    for number in range(1, 5):
        publish(tmp_path, number * 100, number)
        assert latest(tmp_path) == number
    assert names(tmp_path) == ["000000000000300", "000000000000400", "latest"]
    assert value_of(tmp_path / "published" / "000000000000300") == 3
    assert os.readlink(tmp_path / "published" / "latest") == "000000000000400"  # moves with the folder


@pytest.mark.parametrize("again", [False, True], ids=["the next", "the same tokens again"])
@pytest.mark.parametrize(
    ("module", "name", "calls"), [(os, "replace", 3), (os, "fsync", 5), (shutil, "rmtree", 3), (os, "symlink", 1)]
)
def test_latest_leads_to_whole_weights_wherever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str, calls: int, again: bool
) -> None:
    """Seen to catch: weights that are replaced where the link leads, a link that is removed before it is made anew."""
    killed = 0
    for call in range(1, calls + 1):
        folder = tmp_path / str(call)
        folder.mkdir()
        for number in (1, 2, 3):
            publish(folder, number, number)
        with monkeypatch.context() as patch:
            kill_at(call, patch, module, name)
            try:
                publish(folder, 3 if again else 4, 4)
            except Killed:
                killed += 1
        assert latest(folder) in (3, 4)
        publish(folder, 5, 5)
        assert latest(folder) == 5
        publish(folder, 6, 6)
        assert len(names(folder)) == 3, "what a killed life has left is removed"
    assert killed >= 1


def test_a_life_that_goes_on_from_before_a_publication_keeps_its_own(tmp_path: Path) -> None:
    """Seen to catch: the newest by number is kept, and that is one of the life that was killed."""
    for tokens in (400, 500):
        publish(tmp_path, tokens, tokens)
    for tokens in (300, 400, 500, 600):
        publish(tmp_path, tokens, tokens + 1)
        assert latest(tmp_path) == tokens + 1
    assert names(tmp_path) == ["000000000000500", "000000000000600", "latest"]
    publish(tmp_path, 600, 7)
    assert latest(tmp_path) == 7 and names(tmp_path) == ["000000000000600", "000000000000600-1", "latest"]


@pytest.mark.parametrize("refuses", ["mkdir", "save_file", "symlink"])
def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    publish(tmp_path, 1, 1.0)

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"mkdir": os, "save_file": write, "symlink": os}[refuses], refuses, full)
        with pytest.raises(RunError, match=r"cannot write .*published.*No space left") as said:
            publish(tmp_path, 2, 2.0)
    assert "\n" not in str(said.value) and latest(tmp_path) == 1
    publish(tmp_path, 2, torch.pi)
