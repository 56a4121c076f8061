"""Jobs of real Slurm daemons, two nodes of one core each on this machine: the files in jobs/slurm, and launch=slurm."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurmd
from launch import BATCH, CURVE, curve, records, words_of

from hvdllm import squeue
from hvdllm.cli.main import main
from hvdllm.errors import STOPPED, UserError
from hvdllm.launch import slurm
from hvdllm.launch.base import Point
from hvdllm.launch.parts import Slurm

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(slurmd.missing()), reason=slurmd.missing() or "-")]
LONG = f"budget_tokens={10**6 * BATCH}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurmd.Cluster]:
    with slurmd.cluster() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(cluster: slurmd.Cluster) -> Iterator[None]:
    yield
    cluster.idle()


@pytest.fixture
def here(cluster: slurmd.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurmd.Cluster:
    """This process as one on the cluster's login node."""
    for name in set(os.environ) | set(cluster.env):
        if name in cluster.env:
            monkeypatch.setenv(name, cluster.env[name])
        else:
            monkeypatch.delenv(name)
    return cluster


def words(tmp: Path, steps: int, *more: str) -> list[str]:
    """Without a name: that is the job's."""
    return [word for word in words_of(tmp, "-", steps, *more) if not word.startswith("name=")]


def submit(cluster: slurmd.Cluster, tmp: Path, name: str, settings: list[str], how: str) -> tuple[str, Path]:
    """jobs/slurm/train.sbatch. Returns the job's number and its log."""
    log = tmp / f"{name}.log"
    options = [f"--job-name={name}", f"--output={log}"]
    return cluster.sbatch(*options, "jobs/slurm/train.sbatch", *settings, HOW=how), log


def started(run: Path) -> Callable[[], bool]:
    return lambda: bool(records(run, "commit"))


def test_two_nodes_train_without_pmix(cluster: slurmd.Cluster, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    job, log = submit(cluster, tmp_path, "mine", words(tmp_path, 3), "gloo")
    said = cluster.ended(job, log)
    assert cluster.state(job) == "COMPLETED", said
    assert (cluster.field(job, "NodeList"), cluster.field(job, "NumTasks")) == ("n[1-2]", "2")
    assert [record["world"] for record in records(run, "run")] == [2]
    assert len(curve(run)) == 3


@pytest.mark.thorough
def test_a_killed_rank_ends_the_job_and_the_same_file_goes_on(cluster: slurmd.Cluster, tmp_path: Path) -> None:
    """On two nodes, by PMIx."""
    run = tmp_path / "runs" / "killed"
    job, log = submit(cluster, tmp_path, "killed", words(tmp_path, 0, LONG, f"save_every={5 * BATCH}"), "srun")
    cluster.until(lambda: bool(records(run, "save")), log)
    (rank,) = (pid for pid in cluster.pids() if b"\0PMIX_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(rank, signal.SIGKILL)
    said = cluster.ended(job, log)
    assert cluster.state(job) == "FAILED", said
    assert "task 1: Killed" in said
    steps = records(run, "commit")[-1]["step"] + 2
    job, log = submit(cluster, tmp_path, "killed", words(tmp_path, steps, f"save_every={5 * BATCH}"), "srun")
    said = cluster.ended(job, log)
    assert cluster.state(job) == "COMPLETED", said
    assert [record["world"] for record in records(run, "run")] == [2, 2]
    assert "resumed" in records(run, "event")[-1]["what"]
    assert [record["step"] for record in records(run, "commit")] == list(range(1, steps + 1))


def test_before_its_limit_a_run_saves_and_is_queued_again(cluster: slurmd.Cluster, tmp_path: Path) -> None:
    """The signal of --signal=B:USR1@60, sent by hand."""
    run = tmp_path / "runs" / "long"
    job, log = submit(cluster, tmp_path, "long", words(tmp_path, 0, LONG), "gloo")
    cluster.until(started(run), log)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: len(records(run, "run")) == 2, log)
    assert cluster.field(job, "Restarts") == "1"
    (saved,) = records(run, "save")
    assert f"job {job} is queued again" in log.read_text()
    assert [e["tokens"] for e in records(run, "event") if "resumed" in e["what"]] == [saved["tokens"]]
    cluster.ask("scancel", "--signal=TERM", job)  # its ranks save and stop, and so the job ends
    cluster.ended(job, log)
    assert (cluster.state(job), cluster.field(job, "ExitCode")) == ("FAILED", f"{STOPPED}:0")
    assert records(run, "end")[-1]["reason"] == "stop"
    assert not list(tmp_path.glob(".hvdllm-*")) and not list(Path().glob(".hvdllm-*"))


@pytest.mark.thorough
def test_an_array_trains_a_point_a_job_and_only_what_is_missing(cluster: slurmd.Cluster, tmp_path: Path) -> None:
    options = ["--job-name=mine", f"--output={tmp_path}/%a.log", "jobs/slurm/sweep.sbatch"]
    settings = words(tmp_path, 3, "exchange.bucket_mb=null", f"runs_dir={tmp_path}/runs")
    file = Path("jobs/slurm/sweep.sbatch").read_text()
    points = re.findall(r'^  "(.*)"$', file, re.M)
    jobs = cluster.sbatch(*options, *settings)
    tasks = [f"{jobs}_{k}" for k in range(len(points))]
    for k, task in enumerate(tasks):
        said = cluster.ended(task, tmp_path / f"{k}.log")
        assert cluster.state(task) == "COMPLETED", said
    assert len({cluster.field(task, "JobId") for task in tasks}) == 3
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(points)
    assert all(records(tmp_path / "runs" / point, "end")[-1]["reason"] == "budget" for point in points)

    again = cluster.sbatch("--array=1,3", *options, *settings)
    assert "has finished" in cluster.ended(f"{again}_1", tmp_path / "1.log")
    assert "task 3 has none" in cluster.ended(f"{again}_3", tmp_path / "3.log")
    assert (cluster.state(f"{again}_1"), cluster.state(f"{again}_3")) == ("COMPLETED", "FAILED")
    assert len(records(tmp_path / "runs" / points[1], "run")) == 1


def point(tmp: Path, name: str, steps: int, *more: str) -> Point:
    return Point(name, str(tmp / "runs"), tuple(words_of(tmp, "-", steps, f'name="{name}"', *more)))


def test_a_point_is_submitted_once_and_waited_for(
    here: slurmd.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By horovodrun on a node; the first waiter leaves before the job begins, the second joins it."""
    settings = Slurm(how="horovodrun", partition="main", options=["--comment x", "--nice=1"])
    one, said = point(tmp_path, "seed=0,a b", 3), []
    gone = threading.Event()
    gone.set()
    assert slurm.launch(one, settings, gone, said.append) == 130
    job = (tmp_path / "runs" / ".seed=0,a b.job").read_text().strip()
    assert said == [
        f"seed=0,a b: job {job} submitted",
        f"seed=0,a b: job {job} goes on without us: the same command joins it, `scancel {job}` ends it",
    ]
    said.clear()
    assert slurm.launch(one, settings, threading.Event(), said.append) == 0, (one.folder / "launch.log").read_text()
    assert said[0] == f"seed=0,a b: job {job} was submitted before: waiting for it"
    assert here.ask("squeue", "-h", "-t", "all", "-o", "%i").split().count(job) == 1
    assert [record["world"] for record in records(one.folder, "run")] == [1]
    assert len(curve(one.folder)[0]) == len(CURVE)
    assert "training loss" in (one.folder / "launch.log").read_text()
    # Forgotten by Slurm, it is judged by what the run says of itself.
    (tmp_path / "runs" / ".seed=0,a b.job").write_text("987654\n")
    assert squeue.ask("987654") is None
    assert slurm.finished(one.folder)
    # While Slurm does not answer, nothing is submitted.
    monkeypatch.setattr(
        slurm, "ask", lambda job: squeue.JobState("", "UNKNOWN", "Unable to contact slurm controller", 0)
    )
    with pytest.raises(UserError, match=r"job 987654 of seed=0,a b is .Unable to contact slurm controller"):
        slurm.submit_once(one, settings)


def test_a_sweep_is_a_job_a_point_and_is_reported(here: slurmd.Cluster, tmp_path: Path) -> None:
    settings = words(tmp_path, 3, "launch=slurm", "launch.sweep=three", "seed=0,1,2", f"eval_every={BATCH}")
    assert main(["train", "-m", *settings]) == 0
    sweep, names = tmp_path / "runs" / "three", [f"seed={seed}" for seed in range(3)]
    jobs = {(sweep / f".{name}.job").read_text().strip() for name in names}
    assert len(jobs) == 3 and all(here.state(job) == "COMPLETED" for job in jobs)
    assert all(records(sweep / name, "end")[-1]["reason"] == "budget" for name in names)
    assert main(["train", "-m", *settings]) == 0
    assert {(sweep / f".{name}.job").read_text().strip() for name in names} == jobs, "nothing was missing"
    assert main(["report", str(sweep), "--out", str(tmp_path / "report.md")]) == 0
    assert "3 seeds" in (tmp_path / "report.md").read_text() or "| 3 |" in (tmp_path / "report.md").read_text()


@pytest.mark.thorough
def test_a_point_that_fails_returns_its_code(here: slurmd.Cluster, tmp_path: Path) -> None:
    bad, said = point(tmp_path, "bad", 3, "micro_batch=0"), []
    assert slurm.launch(bad, Slurm(), threading.Event(), said.append) == 2
    assert "micro_batch" in (bad.folder / "launch.log").read_text()
    first = (tmp_path / "runs" / ".bad.job").read_text()
    job, new = slurm.submit_once(bad, Slurm())
    assert new and job != first.strip()  # what has ended is submitted again


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Slurm(partition="nowhere"), "Invalid partition name specified"),
        (Slurm(partition="paid", account="nobody"), "Invalid account or account/partition combination specified"),
        (Slurm(nodes=3), "Batch job submission failed: .*(processors|[Nn]ode)"),
    ],
)
def test_what_slurm_refuses_is_its_own_sentence(
    here: slurmd.Cluster, tmp_path: Path, settings: Slurm, says: str
) -> None:
    with pytest.raises(UserError, match=says) as raised:
        slurm.launch(point(tmp_path, "one", 1), settings, threading.Event(), lambda text: None)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("Slurm refuses one (")
    assert "sbatch: error" not in str(raised.value)
