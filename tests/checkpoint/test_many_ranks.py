"""A checkpoint that many ranks write together: what each hands out, how it is put together, how it fails."""

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hvdllm.checkpoint import read, write
from hvdllm.checkpoint.whole import read_state
from hvdllm.errors import PeerError, RunError, UserError
from hvdllm.exchange.base import State
from hvdllm.flat import Flat
from hvdllm.world import virtual
from hvdllm.world.single import SingleWorld


class Killed(BaseException):
    """Nothing after it runs on any rank, as after SIGKILL of a job."""


def flat(ranks: int, bucket_bytes: float = 100) -> Flat:
    return Flat(nn.Sequential(nn.Linear(30, 7), nn.Linear(7, 3)).double(), ranks, bucket_bytes)


def filled(own: Flat, seed: int) -> torch.Tensor:
    """A vector over the map, the same for every cut of it; padding 99."""
    draw = torch.Generator().manual_seed(seed)
    vector = torch.full_like(own.x, 99)
    for name in sorted(own.at):
        own.view(name, vector).copy_(torch.randn(own.parameters[name].shape, generator=draw))
    return vector


def over(spans: list[Any], vector: torch.Tensor) -> torch.Tensor:
    return torch.cat([vector[start:stop] for start, stop, _ in spans])


def same(a: torch.Tensor, b: torch.Tensor, own: Flat) -> bool:
    return all(torch.equal(own.view(name, a), own.view(name, b)) for name in own.at)


TENSORS = {
    "q/0": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(0.5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3), "seen": torch.tensor([True, False]), "count": torch.tensor([2**40, -1]),
}  # fmt: skip


def save(world: Any, folder: Path, step: int, seed: int, summed: bool = True, keep: int = 9) -> Path | None:
    """Rank i hands out its pieces of model (seed) and m (seed + 1), and its own residual (seed + 10 + i)."""
    own = flat(world.size)
    spans = own.pieces(world.rank, world.size)
    sharded = {"model": over(spans, filled(own, seed)), "m": over(spans, filled(own, seed + 1))}
    state = State({"step": step}, spans, sharded, {"rank": world.rank})
    if summed:
        state.summed["error"] = (own.pieces(0, 1), filled(own, seed + 10 + world.rank))
        state.tensors = TENSORS
    where = folder if world.rank == 0 else Path("/not the folder, rank 0 says which")
    return write.write(where, own, state, {"horizon": 5}, world, keep, {"clock": 10 * world.rank})


class Counted:
    """A world that counts its collectives by name."""

    def __init__(self, world: Any) -> None:
        self.world, self.names = world, Counter[str]()

    def __getattr__(self, key: str) -> Any:
        if key not in ("texts", "sum", "gather", "broadcast", "agree"):
            return getattr(self.world, key)

        def call(x: Any, name: str, *more: Any) -> Any:
            self.names[name] += 1
            return getattr(self.world, key)(x, name, *more)

        return call


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_rank_writes_its_own_and_any_number_reads_all(n: int, tmp_path: Path) -> None:
    paths = virtual.run(n, lambda world: save(world, tmp_path, 4, 1))
    final = tmp_path / "checkpoints" / "4"
    assert paths == [final] + [None] * (n - 1) and read.broken(final) is None
    files = sorted(path.name for path in final.iterdir())
    assert files == ["manifest.json", *[f"rank-{rank:05d}.safetensors" for rank in range(n)], "state.json"]
    named = json.loads((final / "manifest.json").read_text())["sha256"]
    assert sorted([*named, "manifest.json"]) == files
    state = read_state(final)
    assert state["mine"] == [{"rank": rank, "clock": 10 * rank} for rank in range(n)] and state["horizon"] == 5
    assert read.saved_ranks(state) == n and read.kinds_of(final, "summed") == ["error"]
    for m in (1, 2, 4):

        def body(world: Any) -> None:
            own = flat(world.size, 1e9)
            for kind, seed in (("model", 1), ("m", 2)):
                assert same(read.share_vector(final, kind, own, world), filled(own, seed), own)

        virtual.run(m, body)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (3, 2), (2, 3), (3, 1)])
def test_what_is_summed_keeps_its_sum(n: int, m: int, tmp_path: Path) -> None:
    """At the same world size each rank's own, bit for bit; else rank 0 has the sum."""
    virtual.run(n, lambda world: save(world, tmp_path, 4, 1))
    final = tmp_path / "checkpoints" / "4"

    def body(world: Any) -> None:
        own = flat(world.size, 1e9)
        loaded = read.load_summed(final, own, world, n)
        assert list(loaded) == ["error"]
        expected = torch.zeros_like(own.x)
        if n == m:
            expected = filled(own, 11 + world.rank)
        elif world.rank == 0:
            for rank in range(n):
                expected += filled(own, 11 + rank)
        assert same(loaded["error"], expected, own)
        padding = torch.ones_like(own.x, dtype=torch.bool)
        for place in own.at.values():
            padding[place] = False
        assert not loaded["error"][padding].any(), "padding enters no checkpoint"

    virtual.run(m, body)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (3, 2), (2, 3)])
def test_what_is_a_ranks_own_comes_back_to_it_alone(n: int, m: int, tmp_path: Path) -> None:
    """At the same world size bit for bit, zeros where it wrote none; else nobody has any. Seen to catch: those of
    another rank, the sum of all, none written."""

    def write_own(world: Any) -> None:
        own = flat(world.size)
        whole = own.pieces(0, 1)
        state = State({"step": 4}, whole if world.rank == 0 else [], {"model": filled(own, 1)}, {})
        state.local["model"] = (whole, filled(own, 20 + world.rank))
        if world.rank == n - 1:
            state.local["made"] = (whole, filled(own, 30))
        write.write(tmp_path, own, state, {}, world, 9)

    virtual.run(n, write_own)
    final = tmp_path / "checkpoints" / "4"
    assert read.kinds_of(final, "local") == ["made", "model"] and read.kinds_of(final, "summed") == []

    def body(world: Any) -> None:
        own = flat(world.size, 1e9)
        local = read.load_local(final, own, world, n)
        assert sorted(local) == (["made", "model"] if n == m else [])
        if n == m:
            assert same(local["model"], filled(own, 20 + world.rank), own)
            assert same(local["made"], filled(own, 30) if world.rank == n - 1 else torch.zeros_like(own.x), own)

    virtual.run(m, body)


def test_ranges_of_a_summed_kind(tmp_path: Path) -> None:
    """Each rank sums over spans of its own, here those of its neighbour; one rank has none."""

    def body(world: Any) -> None:
        own = flat(3)
        spans = own.pieces((world.rank + 1) % 3, 3)
        summed = {} if world.rank == 1 else {"error": (spans, over(spans, filled(own, 5)))}
        write.write(tmp_path, own, State({"step": 1}, [], {}, {}, summed), {}, world, 1)
        got = read.load_summed(tmp_path / "checkpoints" / "1", own, world, 3)["error"]
        expected = torch.zeros_like(own.x)
        for start, stop, _ in [] if world.rank == 1 else spans:
            expected[start:stop] = filled(own, 5)[start:stop]
        assert same(got, expected, own)

    virtual.run(3, body)
    files = [path.name for path in (tmp_path / "checkpoints" / "1").glob("*.safetensors")]
    assert sorted(files) == ["rank-00000.safetensors", "rank-00002.safetensors"]


def test_tensors_of_any_shape_come_from_rank_0(tmp_path: Path) -> None:
    virtual.run(2, lambda world: save(world, tmp_path, 4, 1))
    final = tmp_path / "checkpoints" / "4"
    assert not any(key.startswith("tensor/") for key in load_file(final / "rank-00001.safetensors"))

    def body(world: Any) -> None:
        shared = read.share_tensors(final, world)
        assert shared.keys() == TENSORS.keys()
        for name, x in TENSORS.items():
            assert shared[name].dtype == x.dtype and shared[name].shape == x.shape and torch.equal(shared[name], x)

    virtual.run(3, body)


def test_two_names_of_one_tensor_are_no_full_disk(tmp_path: Path) -> None:
    own, x = flat(1), torch.arange(3)
    state = State({"step": 1}, own.pieces(0, 1), {"model": own.x}, {}, tensors={"a": x, "b": x, "c": x[1:]})
    write.write(tmp_path, own, state, {}, SingleWorld(), 1)
    assert torch.equal(read.read_tensors(tmp_path / "checkpoints" / "1")["c"], torch.tensor([1, 2]))


def test_where_rank_0_hands_out_everything_no_hashes_travel(tmp_path: Path) -> None:
    def body(world: Any) -> Any:
        counted, own = Counted(world), flat(world.size)
        spans = own.pieces(0, 1) if world.rank == 0 else []
        write.write(tmp_path, own, State({"step": 1}, spans, {"model": own.x}, {}), {}, counted, 1)
        alone = dict(counted.names)
        save(counted, tmp_path, 2, 1)
        return alone, sum(counted.names.values())

    for alone, all_of_them in virtual.run(3, body):
        assert alone == {"act.save": 1, "act.save.done": 1} and all_of_them == 5
    assert len(list((tmp_path / "checkpoints" / "2").glob("rank-*"))) == 3


# ------------------------------------------------------------------ failures
def failures(n: int, body: Any) -> list[str]:
    """What RunError says on each rank; a rank that goes on, or is left behind in a collective, fails the test."""

    def caught(world: Any) -> str:
        with pytest.raises(RunError) as said:
            body(world)
        return str(said.value)

    said = virtual.run(n, caught)
    assert len(set(said)) == 1 and "\n" not in said[0]
    return said


def refuse_at(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """The disk of this rank is full."""

    def save_or_not(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if path.name == f"rank-{rank:05d}.safetensors":
            os.truncate(path, 10)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "save_file", save_or_not)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_full_disk_of_any_rank_fails_on_all_with_one_sentence(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    virtual.run(3, lambda world: save(world, tmp_path, 1, 1))
    with monkeypatch.context() as patch:
        refuse_at(patch, rank)
        said = failures(3, lambda world: save(world, tmp_path, 2, 2, keep=1))[0]
    assert f"on rank {rank}: cannot write the checkpoint of step 2 to {tmp_path}" in said and "No space left" in said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert read.broken(tmp_path / "checkpoints" / "1") is None
    virtual.run(3, lambda world: save(world, tmp_path, 2, 2, keep=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_rank_0_may_fail_until_the_end(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """state.json, manifest.json, the last rename: the others wait for it, whoever wrote."""
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1))
    real, calls = os.replace, iter(range(1, 99))

    def replace(a: Any, b: Any) -> None:
        if next(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    assert "Input/output error" in failures(2, lambda world: save(world, tmp_path, 2, 2))[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_folder_that_cannot_be_made_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    assert "cannot write the checkpoint" in failures(2, lambda world: save(world, tmp_path, 2, 2))[0]


def test_a_folder_that_another_host_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "SEEN_WITHIN_S", 0.0)
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1))
    hidden = tmp_path / "checkpoints" / ".2"

    class Away(Counted):
        """Rank 1's host has no such folder: from its view rank 0 never made it."""

        def __getattr__(self, key: str) -> Any:
            call = super().__getattr__(key)
            if key != "texts":
                return call

            def texts(text: str, name: str) -> Any:
                said = call(text, name)
                if name == "act.save" and self.world.rank:
                    heads = [json.loads(each) for each in said]
                    heads[0]["folder"] = str(tmp_path / "elsewhere")
                    return [json.dumps(head) for head in heads]
                return said

            return texts

    said = failures(2, lambda world: save(Away(world), tmp_path, 2, 2))[0]
    assert "on rank 1: runs_dir must be shared by all hosts" in said and "elsewhere/checkpoints/.2" in said
    assert not hidden.exists() and not (tmp_path / "elsewhere").exists()
    # A folder of that name is there, but is another: rank 0 misses the file.
    (tmp_path / "elsewhere" / "checkpoints" / ".2").mkdir(parents=True)
    said = failures(2, lambda world: save(Away(world), tmp_path, 2, 2))[0]
    assert "runs_dir must be shared by all hosts" in said and "rank-00001" in said and not hidden.exists()
    assert [path.name for path in write.steps(tmp_path)] == ["1"]


# Rank files are fsynced by each rank (1, 2), then state.json, its folder and itself once more (3 to 5), manifest.json
# and its folder (6, 7); after the rename the folder above (8).
@pytest.mark.parametrize(
    ("module", "name", "call", "left"),
    [
        *[(write, "save_file", call, 1) for call in (1, 2)],
        *[(os, "fsync", call, 1) for call in range(1, 8)],
        *[(os, "replace", call, 1) for call in (1, 2, 3)],
        (os, "fsync", 8, 2),
        (write, "prune", 1, 2),
    ],
)
def test_killed_while_two_ranks_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int, left: int
) -> None:
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1))
    real, calls = getattr(module, name), iter(range(1, 99))

    def killing(*args: Any, **more: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killing)
        with pytest.raises(Killed):
            virtual.run(2, lambda world: save(world, tmp_path, 2, 2))
    path = read.newest(tmp_path, pytest.fail)
    assert path is not None and path.name == str(left)
    own = flat(1)
    assert same(read.share_vector(path, "m", own, SingleWorld()), filled(own, left + 1), own)
    virtual.run(2, lambda world: save(world, tmp_path, 3, 3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [*[str(step) for step in range(1, left + 1)], "3"], "what a killed life left is cleared away"


def test_a_rank_killed_while_it_writes_leaves_the_others_with_a_peer_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[type[BaseException]] = []

    def killing(tensors: Any, path: Path) -> None:
        if path.name == "rank-00001.safetensors":
            raise Killed

    def body(world: Any) -> None:
        try:
            save(world, tmp_path, 1, 1)
        except BaseException as error:
            errors.append(type(error))
            raise

    monkeypatch.setattr(write, "save_file", killing)
    with pytest.raises(Killed):
        virtual.run(2, body)
    assert set(errors) == {Killed, PeerError} and write.steps(tmp_path) == []


# ------------------------------------------------------------------ what is not as it should be
def refused(n: int, body: Any) -> str:
    """What UserError says, the same on every rank."""

    def caught(world: Any) -> str:
        with pytest.raises(UserError) as said:
            body(world)
        return str(said.value)

    (said, *others) = virtual.run(n, caught)
    assert others == [said] * (n - 1)
    return said


def test_a_file_that_is_gone_is_missed_by_all(tmp_path: Path) -> None:
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1))
    final = tmp_path / "checkpoints" / "1"
    (final / "rank-00001.safetensors").unlink()
    assert read.broken(final) == "rank-00001.safetensors is missing"
    assert "does not fit this model" in refused(2, lambda world: read.share_vector(final, "m", flat(2), world))


def test_files_that_are_none_are_named_on_all_ranks(tmp_path: Path) -> None:
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1))
    final = tmp_path / "checkpoints" / "1"
    (final / "rank-00001.safetensors").write_bytes(b"nothing")
    for body in (
        lambda world: read.share_vector(final, "m", flat(2), world),
        lambda world: read.load_summed(final, flat(2), world, 2),
        lambda world: read.load_summed(final, flat(2), world, 7),
        lambda world: read.share_tensors(final, world),
    ):
        assert "cannot be read" in refused(2, body)


def test_ranges_that_overlap_are_refused(tmp_path: Path) -> None:
    """As many elements as the tensor has, but the first half twice."""
    own = flat(1)
    whole = {f"m/{name}": torch.zeros(own.parameters[name].shape) for name in own.at if name != "0.weight"}
    for rank in range(2):
        save_file({**whole, "m/0.weight@0": torch.zeros(105)}, tmp_path / f"rank-{rank:05d}.safetensors")
        whole = {}
    with pytest.raises(UserError, match=r"ranges of `m/0\.weight` overlap"):
        read.read_vector(tmp_path, "m", own, torch.zeros_like(own.x))


@pytest.mark.parametrize("start", ["200", "x", "-1"])
def test_a_range_beyond_its_tensor_is_refused(start: str, tmp_path: Path) -> None:
    own = flat(1)
    save_file({f"summed.e/0.weight@{start}": torch.ones(11)}, tmp_path / "rank-00000.safetensors")
    with pytest.raises(UserError, match=rf"`summed\.e/0\.weight@{start}` has 11 elements"):
        read.read_ranks(tmp_path, "summed.e", own, 0)


def test_a_part_that_a_host_does_not_see_is_said_by_all(tmp_path: Path) -> None:
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1))
    final = tmp_path / "checkpoints" / "1"

    def body(world: Any) -> None:
        read.load_summed(final if world.rank == 0 else tmp_path / "not here", flat(2), world, 2)

    said = refused(2, body)
    assert said.startswith("on rank 1: runs_dir must be shared by all hosts") and "not here" in said


def test_without_anything_summed_only_rank_0_needs_the_folder(tmp_path: Path) -> None:
    virtual.run(2, lambda world: save(world, tmp_path, 1, 1, summed=False))

    def body(world: Any) -> None:
        own = flat(2)
        path = tmp_path / ("checkpoints/1" if world.rank == 0 else "not here")
        assert read.load_summed(path, own, world, 2) == {} and read.share_tensors(path, world) == {}
        assert same(read.share_vector(path, "model", own, world), filled(own, 1), own)

    virtual.run(2, body)
