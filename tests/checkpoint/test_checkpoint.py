"""What has its final name is whole; what is not whole is passed over and named."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hvdllm.checkpoint import read, write
from hvdllm.checkpoint.whole import read_state
from hvdllm.errors import RunError, UserError
from hvdllm.exchange.base import State
from hvdllm.flat import Flat
from hvdllm.runs import write_whole
from hvdllm.world.single import SingleWorld

ROOT = Path(__file__).resolve().parents[2]


def flat() -> Flat:
    return Flat(nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 3)), 2, 100)


def save(folder: Path, step: int, keep: int = 9) -> Flat:
    """x is step everywhere a tensor is, m is x + 1."""
    own = flat()
    for name in own.at:
        own.view(name).detach().fill_(step)
    state = State({"step": step, "tokens": 10 * step}, own.pieces(0, 1), {"model": own.x, "m": own.x + 1}, {"said": 1})
    write.write(folder, own, state, {"horizon": 5}, SingleWorld(), keep)
    return own


def test_round_trip(tmp_path: Path) -> None:
    own = save(tmp_path, 3)
    path = read.newest(tmp_path, pytest.fail)
    assert path is not None and path.name == "3"
    state = read_state(path)
    assert state["shared"]["tokens"] == 30 and state["mine"] == [{"said": 1}] and state["horizon"] == 5
    assert torch.equal(read.share_vector(path, "model", own, SingleWorld()), own.x)
    other = Flat(nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 3)), 5, 1e9)
    vector = read.share_vector(path, "m", other, SingleWorld())
    assert all(torch.equal(other.view(name, vector), own.view(name) + 1) for name in own.at)


def test_ranges_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    own = flat()
    for rank in range(2):
        spans = own.pieces(rank, 2)
        cut = own.cut(spans, torch.cat([own.x[a:b] for a, b, _ in spans]))
        save_file({f"m/{p.name}@{p.start}": p.values.clone() for p in cut}, tmp_path / f"rank-{rank:05d}.safetensors")
    vector = torch.zeros_like(own.x)
    read.read_vector(tmp_path, "m", own, vector)
    assert torch.equal(vector, own.x)
    (tmp_path / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match="does not fit"):
        read.read_vector(tmp_path, "m", own, vector)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: os.truncate(p / "rank-00000.safetensors", 100), "is not what was written"),
        (lambda p: (p / "state.json").write_text((p / "state.json").read_text().replace("5", "6")), "state.json"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest cannot be read"),
    ],
)
def test_a_broken_one_is_passed_over_and_named(tmp_path: Path, damage: object, says: str) -> None:
    save(tmp_path, 3)
    save(tmp_path, 4)
    damage(tmp_path / "checkpoints" / "4")  # type: ignore[operator]
    said: list[str] = []
    path = read.newest(tmp_path, said.append)
    assert path is not None and path.name == "3"
    assert len(said) == 1 and says in said[0] and "checkpoints/4" in said[0]


def test_the_last_ones_are_kept_and_an_old_broken_one_is_replaced(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save(tmp_path, step, keep=2)
    assert [path.name for path in write.steps(tmp_path)] == ["9", "10"]
    os.truncate(tmp_path / "checkpoints" / "10" / "state.json", 3)
    save(tmp_path, 10, keep=2)
    assert read.broken(tmp_path / "checkpoints" / "10") is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "9"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of one's own needs root")
def test_a_full_disk_is_a_sentence_and_leaves_the_one_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        save(disk, 1)
        (disk / "filler").write_bytes(bytes(48 * 1024 - 4096))
        with pytest.raises(RunError, match="cannot write the checkpoint of step 2"):
            for step in range(2, 20):
                save(disk, 2 if step == 2 else step)
                pytest.fail("it fitted") if step == 19 else (disk / f"more{step}").write_bytes(bytes(8192))
        path = read.newest(disk, pytest.fail)
        assert path is not None and not list((disk / "checkpoints").glob(".*"))
    except OSError:  # the filler itself
        pytest.skip("the file system is smaller than asked for")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_was_removed_stays_away(tmp_path: Path) -> None:
    """Seen to catch: a checkpoint that makes the run's folder anew, with nothing else in it."""
    with pytest.raises(RunError, match="was removed, moved or taken over"):
        save(tmp_path / "gone", 1)
    assert not (tmp_path / "gone").exists()


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "old")

    def crash(*names: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_no_pickle() -> None:
    for path in (ROOT / "hvdllm").rglob("*.py"):
        text = path.read_text()
        assert "pickle" not in text and "torch.load(" not in text, path


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    named = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert {*named, "manifest.json"} == {path.name for path in folder.iterdir()}
