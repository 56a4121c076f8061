"""Runs of launch=ray on a real cluster of two nodes on this machine, and how they end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_cluster
from launch import BATCH, HVDLLM, Job, curve, launch, records, words_of

from hvdllm.cli.main import main
from hvdllm.errors import STOPPED

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(ray_cluster.missing()), reason=ray_cluster.missing() or "-")]
LONG = 10**6
TWO = ["launch=ray", "launch.nodes=2", f"save_every={5 * BATCH}"]


@pytest.fixture(scope="module")
def made() -> Iterator[ray_cluster.Cluster]:
    with ray_cluster.cluster() as made:
        yield made


@pytest.fixture
def cluster(made: ray_cluster.Cluster) -> Iterator[ray_cluster.Cluster]:
    """Its nodes live before each test, and no rank does after it."""
    for name in ("n1", "n2"):
        if name not in made.daemons:
            made.start(name)
    yield made
    made.until(lambda: not made.ranks())


def job(cluster: ray_cluster.Cluster, words: list[str]) -> Job:
    return Job([*HVDLLM, "train", *words], "real alone", **cluster.env)


def saves(run: Path, job: Job, more: int = 1) -> None:
    """Waits until the run has saved that often from now on, with both ranks in training."""
    enough = len(records(run, "save")) + more
    job.until(lambda: len(records(run, "save")) >= enough)


def test_two_nodes_train_as_two_ranks_of_horovodrun_do(cluster: ray_cluster.Cluster, tmp_path: Path) -> None:
    launch([*HVDLLM, "train", *words_of(tmp_path, "a", 3)], "gloo", 2)
    with job(cluster, words_of(tmp_path, "b", 3, *TWO)) as here:
        done = here.wait()
        assert done.code == 0, done.out
    a, b = (tmp_path / "runs" / name for name in "ab")
    assert curve(a) == curve(b)
    (record,) = records(b, "run")
    assert record["world"] == 2
    assert not list((tmp_path / "runs").glob(".hvdllm-*")), "the token is removed"


@pytest.mark.thorough
def test_torch_distributed_meets_at_the_same_place(cluster: ray_cluster.Cluster, tmp_path: Path) -> None:
    with job(cluster, words_of(tmp_path, "a", 3, "exchange=ddp", "exchange.bucket_mb=null", *TWO)) as here:
        done = here.wait()
        assert done.code == 0, done.out
    assert len(curve(tmp_path / "runs" / "a")) == 3


def test_a_killed_rank_a_lost_node_and_a_stop(cluster: ray_cluster.Cluster, tmp_path: Path) -> None:
    run, words = tmp_path / "runs" / "a", words_of(tmp_path, "a", LONG, *TWO)
    with job(cluster, words) as here:
        saves(run, here)
        os.kill(cluster.ranks()[1], signal.SIGKILL)
        done = here.wait()
    assert done.code == 128 + signal.SIGKILL
    *_, before, said = (line for line in done.out.splitlines() if line.startswith("hvdllm: "))
    assert before.startswith("hvdllm: rank 1 on host ") and "the same command with name=a goes on" in before
    assert said.startswith("hvdllm: rank 1 on node n2 (") and said.endswith(") was killed by SIGKILL")
    cluster.until(lambda: not cluster.ranks())

    with job(cluster, words) as here:  # the same command goes on
        saves(run, here)
        cluster.kill("n2")
        here.until(lambda: "waiting up to 600 s for a node" in here.out)
        assert len(records(run, "run")) == 2
        cluster.start("n2")
        here.until(lambda: len(records(run, "run")) == 3)
        saves(run, here)
        here.signal(signal.SIGINT)
        done = here.wait()
        here.until_gone()
    assert done.code == STOPPED, done.out
    assert "rank 1 on node n2 (" in done.out and " is gone (Actor" in done.out
    assert "raylet" not in done.out, "Ray's own pages are not the user's"
    assert records(run, "end")[-1]["reason"] == "stop"
    assert [record["step"] for record in records(run, "commit")] == list(range(1, len(records(run, "commit")) + 1))
    assert len([e for e in records(run, "event") if "resumed" in e["what"]]) == 2


def test_ranks_of_a_killed_driver_save_and_end(cluster: ray_cluster.Cluster, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with job(cluster, words_of(tmp_path, "a", LONG, *TWO)) as here:
        saves(run, here)
        (driver,) = (pid for pid in here.pids() if "ray_driver" in words_of_process(pid) and pid != here.process.pid)
        os.kill(driver, signal.SIGKILL)
        done = here.wait()
        cluster.until(lambda: not cluster.ranks())
    assert done.code in (128 + signal.SIGKILL, STOPPED)
    assert [record["reason"] for record in records(run, "end")] == ["stop"]
    assert records(run, "save")[-1]["tokens"] == records(run, "end")[-1]["tokens"]


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_after_an_actor_has_died(cluster: ray_cluster.Cluster, rank: int, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with job(cluster, words_of(tmp_path, "a", LONG, *TWO)) as here:
        saves(run, here)
        os.kill(cluster.actor(rank), signal.SIGKILL)
        here.until(lambda: len(records(run, "run")) == 2)
        here.signal(signal.SIGTERM)
        assert here.wait().code in (STOPPED, 128 + signal.SIGTERM)  # the latter before the ranks hear it
        assert f"rank {rank} on node n{rank + 1} (" in here.out


@pytest.mark.thorough
def test_a_second_interrupt_ends_it_at_once(cluster: ray_cluster.Cluster, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with job(cluster, words_of(tmp_path, "a", LONG, *TWO)) as here:
        saves(run, here)
        here.signal(signal.SIGINT)
        here.until(lambda: "Ctrl-C again" in here.out)
        here.signal(signal.SIGINT)
        assert here.wait().code in (130, STOPPED)
        cluster.until(lambda: not cluster.ranks())


def test_points_of_a_sweep_run_at_once_and_are_reported(cluster: ray_cluster.Cluster, tmp_path: Path) -> None:
    words = [word for word in words_of(tmp_path, "-", 3, f"eval_every={BATCH}") if not word.startswith("name=")]
    with job(cluster, ["-m", "launch=ray", "launch.np=1", "launch.sweep=two", "seed=0,1", *words]) as here:
        done = here.wait()
    assert done.code == 0, done.out
    sweep = tmp_path / "runs" / "two"
    assert all(records(sweep / f"seed={seed}", "end")[-1]["reason"] == "budget" for seed in (0, 1))
    assert done.out.index("seed=1  begins") < done.out.index("seed=0  done"), "both have room"
    launch([*HVDLLM, "report", str(sweep), "--out", str(tmp_path / "report.md")])
    assert "2 seeds" in (tmp_path / "report.md").read_text() or "| 2 |" in (tmp_path / "report.md").read_text()


def test_too_little_room_is_a_sentence(
    cluster: ray_cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cluster.ray.items():
        monkeypatch.setenv(name, value)
    for words, asked in (
        (["launch.np=3"], "launch.np=3: the Ray cluster has no room for so many ranks of 1 CPUs and 0 GPUs"),
        (["launch.gpus_per_rank=1"], "launch.np=2: the Ray cluster has no room for so many ranks of 1 CPUs and 1 GPUs"),
    ):
        assert main(["train", *words_of(tmp_path, "a", 3, "launch=ray", *words)]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"hvdllm: {asked} (n1 (") and "1 CPUs, 0 GPUs" in said
    assert not (tmp_path / "runs").exists()


def words_of_process(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
