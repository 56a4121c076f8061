"""`hvdllm train` unchanged under every launcher, and what ranks must agree on before they train."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launch import HVDLLM, RANKS, launch, records, words_of, write_text

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("how", "n"), [("alone", 1), ("gloo", 2), ("mpi", 2), ("mpirun", 3)])
def test_every_launcher(how: str, n: int, tmp_path: Path) -> None:
    words = [word for word in words_of(tmp_path, "a", 3) if not word.startswith("device.threads")]
    launch([*HVDLLM, "train", *words], f"real {how}", n)
    (run,) = records(tmp_path / "runs" / "a", "run")
    assert run["world"] == n and len(run["ranks"]) == n
    cores = len(os.sched_getaffinity(0))
    if how != "mpirun":  # which may bind a rank to one core
        assert run["threads"] == max(1, cores // n), "set by hvdllm: OMP_NUM_THREADS is not"
    assert run["command"][1:2] == ["train"] and run["overrides"] == words
    assert run["config"]["optim"]["name"] == "adamw" and {"torch", "python", "hvdllm"} <= run["versions"].keys()
    assert run["parameters"] > 0 and run["flops_per_token"] > 6 * 1000 and run["data_hash"] and run["tokenizer_hash"]
    assert {"host", "device", "kind", "threads"} <= run["ranks"][-1].keys() and {"commit", "dirty"} == run["git"].keys()
    (end,) = records(tmp_path / "runs" / "a", "end")
    assert end["reason"] == "budget" and end["peak_memory_bytes"] > 0 and end["device_hours"] > 0 and end["mfu"] is None


def test_alone_no_horovod_is_imported(tmp_path: Path) -> None:
    code = "import sys; from hvdllm.cli.main import main; main(sys.argv[1:]); print('horovod' in sys.modules)"
    done = launch([sys.executable, "-c", code, "train", *words_of(tmp_path, "a", 2)], "real alone")
    assert done.out.splitlines()[-1] == "False"


@pytest.mark.parametrize("how", ["gloo", pytest.param("mpi", marks=pytest.mark.thorough)])
def test_a_wrong_setting_is_said_once(how: str, tmp_path: Path) -> None:
    done = launch([*HVDLLM, "train", "exchange=aco"], f"real {how}", 2, code=None)
    assert done.out.count("there is no exchange=aco: choose one of acco, acco_timed, allreduce") == 1
    assert not (tmp_path / "runs").exists()


def test_what_only_one_rank_sees_stops_all(tmp_path: Path) -> None:
    """Rank 1 is given another text, then a broken one."""
    words = words_of(tmp_path, "a", 3)
    write_text(tmp_path / "other", seed=1)
    for path, says in (
        (f"{tmp_path}/other/train.txt", "the ranks have different text"),
        (f"{tmp_path}/nowhere.txt", "on rank 1: "),
    ):
        code = (
            "import os, sys; from hvdllm.cli.main import main\n"
            f"other = ['text.path={path}'] if os.environ['HOROVOD_RANK'] == '1' else []\n"
            "sys.exit(main(['train', *sys.argv[1:], *other]))"
        )
        done = launch([sys.executable, "-c", code, *words], "gloo", 2, code=None)
        assert done.out.count(says) == 1
        assert not (tmp_path / "runs" / "a").exists()


def world_body(body: str, what: str, how: str, n: int, tmp: Path) -> list[dict[str, Any]]:
    """What each rank said, in rank order."""
    launch([sys.executable, str(RANKS / body), str(tmp), what], how, n, OMP_NUM_THREADS="1")
    return [json.loads(path.read_text()) for path in sorted(tmp.glob("?.json"))]


def check_collectives(said: list[dict[str, Any]], n: int) -> None:
    for rank, one in enumerate(said):
        assert one["sum"] == [sum(range(n)) + 0.5 * n] * 3 and one["double"] == 2.0**53 - 1
        assert one["scatter"] == [0.0 if n == 2 else 1.0, 10.0 * sum(range(n))], "added in rank order"
        assert one["scatter_bf16"] == [256.0 if n == 2 else 258.0], "added in fp32, rounded once"
        for dtype in ("float32", "bfloat16", "uint8", "float64"):
            assert one[f"alltoall_torch.{dtype}"] == [2 * rank + i + 16 * source for source in range(n) for i in (0, 1)]
        assert one["bits"] == [0x7FC1, 1] * n
        assert one["gather"] == [float(rank) for rank in range(n) for _ in range(rank + 1)]
        assert one["gather_equal"] == [[rank, rank] for rank in range(n)]
        assert one["gather_empty"] == [2 * (n // 2), 3]
        assert one["broadcast"] == [n - 1.0] * 2
        assert one["channels"] == {"total": [n] * 2, "ragged": [1] * sum(range(1, n + 1)), "behind": [2 * n] * 3}
        assert one["driven"] == [n, n] and one["order"] == ["a>", "<a", "b>", "<b"]
        assert one["texts"] == ["", "é" * 100, "zz"][:n]
        assert one["agree"] == "on rank 1: no"
        if n == 2:  # the pair formula in NumPy
            a, b = np.arange(6.0), np.arange(6.0) - 2
            pair = (1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b
            np.testing.assert_allclose(one["adasum"], pair, rtol=1e-6)
        else:
            assert "power of two" in one["adasum"]


def check_sent(said: list[dict[str, Any]], n: int, torch_world: bool) -> None:
    """Bytes by each rank. Of a broadcast from the last rank: a binomial tree. torch gathers sizes first, and pads."""
    for rank, one in enumerate(said):
        share, sizes = (n - 1) / n, 8 * (n - 1) * torch_world
        assert one["sent"] == pytest.approx({
            "sum": 2 * share * 12, "scatter": share * 8 * n, "alltoall_torch.float32": share * 16 * n,
            "alltoall_torch.bfloat16": share * 8 * n, "alltoall_torch.uint8": share * 4 * n,
            "alltoall_torch.float64": share * 32 * n, "gather": (n - 1) * 4 * (n if torch_world else rank + 1) + sizes,
            "gather_equal": (n - 1) * 4 + sizes, "gather_known": (n - 1) * 4,
            "broadcast": 4 * {2: [0, 1], 3: [0, 0, 2]}[n][rank],
        })  # fmt: skip


@pytest.mark.parametrize(("how", "n"), [pytest.param("gloo", 2, marks=pytest.mark.thorough), ("gloo", 3), ("mpi", 2)])
def test_the_world_over_horovod(how: str, n: int, tmp_path: Path) -> None:
    said = world_body("body_world.py", "all", how, n, tmp_path)
    assert len(said) == n
    check_collectives(said, n)
    check_sent(said, n, False)
    for one in said:
        assert "bfloat16" in one["sum_bf16"] and "groups=True" in one["split"]
        assert one["stock"] == [[3.0 * sum(range(1, n + 1))] * 2]


@pytest.mark.parametrize(
    ("how", "n"),
    [
        pytest.param("torchrun", 2, marks=pytest.mark.thorough),
        ("real torchrun", 3),
        ("gloo", 2),
        pytest.param("mpirun", 2, marks=pytest.mark.thorough),
    ],
)
def test_the_world_over_torch(how: str, n: int, tmp_path: Path) -> None:
    said = world_body("body_torch_world.py", "all", how, n, tmp_path)
    assert len(said) == n
    check_collectives(said, n)
    check_sent(said, n, True)
    assert all(one["sum_bf16"] == [sum(range(1, n + 1))] * 2 for one in said)


@pytest.mark.parametrize(("body", "how"), [("body_world.py", "gloo"), ("body_torch_world.py", "torchrun")])
def test_parts_of_a_world(body: str, how: str, tmp_path: Path) -> None:
    said = world_body(body, "parts", how, 4, tmp_path)
    assert len(said) == 4
    for rank, one in enumerate(said):
        for name, group in (("cross", [rank % 2, rank % 2 + 2]), ("near", [rank // 2 * 2, rank // 2 * 2 + 1])):
            part, me = one[name], group.index(rank)
            own = [[i * 10.0**member for i in range(4)] for member in group]
            total = [sum(column) for column in zip(*own, strict=True)]
            assert part["place"] == [me, 2, me, 2]
            assert part["sum"] == total and part["scatter"] == total[2 * me : 2 * me + 2]
            assert part["gather"] == [*own[0][:1], *own[1][:2]]
            assert part["alltoall"] == [*own[0][2 * me : 2 * me + 2], *own[1][2 * me : 2 * me + 2]]
            assert part["broadcast"] == own[1] and part["texts"] == [str(member) for member in group]
            assert part["driven"] == 2 and part["adasum"] == [3.0, 3.0]


def test_over_torch_all_name_the_rank_that_is_gone(tmp_path: Path) -> None:
    """Also where nothing but a GPU waits for it, which NCCL would let wait for ever."""
    for says in world_body("body_torch_world.py", "gone", "torchrun", 3, tmp_path):
        assert says["gpu"] == "the GPU waits for rank 1, which is gone"
        assert "because rank 1 is gone" in says["sum"]
