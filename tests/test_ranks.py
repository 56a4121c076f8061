"""`hvdllm train` unchanged under every launcher, and what ranks must agree on before they train."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launch import HVDLLM, RANKS, launch, records, words_of, write_text

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("how", "n"), [("alone", 1), ("gloo", 2), ("mpi", 2), ("mpirun", 3)])
def test_every_launcher(how: str, n: int, tmp_path: Path) -> None:
    words = [word for word in words_of(tmp_path, "a", 3) if not word.startswith("device.threads")]
    launch([*HVDLLM, "train", *words], how, n)
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
    done = launch([sys.executable, "-c", code, "train", *words_of(tmp_path, "a", 2)])
    assert done.out.splitlines()[-1] == "False"


@pytest.mark.parametrize("how", ["gloo", "mpi"])
def test_a_wrong_setting_is_said_once(how: str, tmp_path: Path) -> None:
    done = launch([*HVDLLM, "train", "exchange=aco"], how, 2, code=None)
    assert done.out.count("there is no exchange=aco: choose one of allreduce") == 1
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


@pytest.mark.parametrize("n", [2, 3])
def test_the_world_over_horovod(n: int, tmp_path: Path) -> None:
    launch([sys.executable, str(RANKS / "body_world.py"), str(tmp_path)], "gloo", n)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]
    for one in said:
        assert one["sum"] == [sum(range(n)) + 0.5 * n] * 3 and one["double"] == 2.0**53 - 1
        assert one["gather"] == [float(rank) for rank in range(n) for _ in range(rank + 1)]
        assert one["broadcast"] == [n - 1.0] * 2
        assert one["texts"] == ["", "é" * 100, "zz"][:n]
        assert one["agree"] == "on rank 1: no"
        assert one["sent"] > 0
