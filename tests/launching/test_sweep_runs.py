"""Sweeps whose points train: here, as horovodrun jobs, over the lab's link; what fails, is stopped, and goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from launch import ADDRESS, BATCH, HVDLLM, Job, address, environment, records, words_of
from ranks.body_sweep import FORKED

from hvdllm.cli import train
from hvdllm.errors import STOPPED
from hvdllm.launch import base, lab, local

needs_lab = pytest.mark.skipif(lab.missing() is not None, reason=f"the network lab cannot be here: {lab.missing()}")


@pytest.fixture(autouse=True)
def a_shells_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    env = environment()
    for name in os.environ.keys() - env.keys():
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    yield
    assert not local._marks


@pytest.fixture
def forked_points(monkeypatch: pytest.MonkeyPatch, a_shells_environment: None) -> None:
    """Points are forks of the tests' server: those that a signal stops are commands."""
    monkeypatch.setattr(base, "PYTHON", FORKED)
    monkeypatch.setenv(ADDRESS, address())


def words(tmp: Path, *more: str, steps: int = 2) -> list[str]:
    """Of a sweep in tmp/runs/s."""
    own = [word for word in words_of(tmp, "x", steps) if not word.startswith(("name=", "eval_every="))]
    return [*own, f"eval_every={10**9}", "launch.sweep=s", *more]


def run(capsys: pytest.CaptureFixture[str], *given: str, code: int = 0) -> str:
    """What `hvdllm train` printed, in this process; the points are processes."""
    assert train.run(list(given)) == code, capsys.readouterr().out
    return capsys.readouterr().out


def begun(out: str) -> list[str]:
    """The points that were started, in order."""
    return [line.split()[1] for line in out.splitlines() if line.startswith("[") and line.endswith("begins")]


def test_a_sweep_runs_its_points_and_again_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_points: None
) -> None:
    given = words(tmp_path, "exchange=allreduce,delayed")
    sweep = tmp_path / "runs" / "s"
    out = run(capsys, "-m", *given, "seed=1")
    assert begun(out) == ["exchange=allreduce", "exchange=delayed"]
    assert "2 points" in out and f"next: hvdllm report {sweep}" in out
    ends = {}
    for name in begun(out):
        (end,) = records(sweep / name, "end")
        assert (end["reason"], end["tokens"]) == ("budget", 2 * BATCH)
        (row,) = [line.split() for line in out.splitlines() if line.startswith(f"{name} ")]
        assert row[-2:] == [f"{end['eval_loss']:.4f}", "done"] and row[1] == f"{2 * BATCH:,}"
        (start,) = records(sweep / name, "run")
        assert (start["config"]["seed"], start["config"]["exchange"]["name"]) == (1, name.partition("=")[2])
        assert start["config"]["launch"]["sweep"] == "s"
        assert "validation loss" in (sweep / name / "launch.log").read_text()
        ends[name] = (sweep / name / "metrics.jsonl").read_bytes()
    about = json.loads((sweep / "sweep.json").read_text())
    assert about["points"] == [{"name": name, "words": [name]} for name in begun(out)]
    assert about["words"] == [*given, "seed=1"] and about["command"].startswith("hvdllm train -m ")

    (sweep / "exchange=delayed" / "final" / "model.safetensors").unlink()
    (sweep / "exchange=delayed" / "metrics.jsonl").write_text("")  # killed at its start
    out = run(capsys, "-m", *given[:-1], "exchange=allreduce,delayed,sharded", "seed=1")
    assert "[1/3] exchange=allreduce  is finished already" in out
    assert "exchange=delayed  goes on" in out and begun(out) == ["exchange=sharded"]
    assert (sweep / "exchange=allreduce" / "metrics.jsonl").read_bytes() == ends["exchange=allreduce"]
    assert records(sweep / "exchange=delayed", "end")[-1]["reason"] == "budget"
    assert len(json.loads((sweep / "sweep.json").read_text())["points"]) == 3
    assert not [file.name for file in Path().iterdir() if file.name in ("multirun", "outputs")]


def test_a_point_that_fails_is_listed_and_the_others_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_points: None
) -> None:
    given = words(tmp_path, "batch_tokens=704,320000")  # the text has fewer windows than the second
    out = run(capsys, "-m", *given, "launch.parallel=2", code=1)
    assert begun(out) == ["batch_tokens=704", "batch_tokens=320000"]  # at once: both begin before one ends
    assert out.index("batch_tokens=320000  begins") < min(out.index("done:"), out.index("failed:"))
    (failed,) = [line for line in out.splitlines() if line.startswith("failed: ")]
    said = (tmp_path / "runs" / "s" / "batch_tokens=320000" / "launch.log").read_text()
    sentence = next(line.removeprefix("hvdllm: ") for line in said.splitlines() if line.startswith("hvdllm: "))
    assert sentence and failed.startswith(f"failed: batch_tokens=320000: {sentence}")
    assert records(tmp_path / "runs" / "s" / "batch_tokens=704", "end")[-1]["reason"] == "budget"
    assert "1 not finished: the same command goes on with what is missing" in out


def test_optuna_gets_the_validation_loss_and_finds_its_trials_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_points: None
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    given = words(tmp_path, "hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-1)", "hydra.sweeper.n_trials=2")
    out = run(capsys, "-m", *given)
    first = begun(out)
    assert len(set(first)) == 2 and all(name.startswith("optim.lr=0.0") for name in first)
    sweep = tmp_path / "runs" / "s"
    losses = {name: records(sweep / name, "end")[-1]["eval_loss"] for name in first}
    best = min(losses, key=lambda name: losses[name])
    assert f"best: {best}, validation loss {losses[best]:.4f}" in out
    given[-1] = "hydra.sweeper.n_trials=3"
    out = run(capsys, "-m", *given)
    assert out.count("is finished already") == 2 and len(begun(out)) == 1
    assert begun(out)[0] not in first


@pytest.mark.ranks
def test_each_point_is_a_horovodrun_job_as_the_users_own_files_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "launch").mkdir()
    (tmp_path / "own" / "launch" / "site.yaml").write_text("defaults: [horovodrun, _self_]\nnp: 3\n")
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /launch: site]\nhydra: {sweeper: {params: {seed: '3,4'}}}\n"
        "launch: {np: 2}\noptim: {lr: 0.025}\n"
    )
    given = [word for word in words(tmp_path) if not word.startswith("launch.sweep=")]
    out = run(capsys, "-m", "--config-dir", os.path.relpath(tmp_path / "own"), "experiment=mine", *given)
    assert begun(out) == ["seed=3", "seed=4"]
    (sweep,) = (tmp_path / "runs").iterdir()
    assert sweep.name.startswith("mine-")
    for name in begun(out):
        (start,) = records(sweep / name, "run")
        assert (start["world"], start["config"]["optim"]["lr"], f"seed={start['config']['seed']}") == (2, 0.025, name)
        assert start["config"]["launch"]["name"] == "local"
        assert records(sweep / name, "end")[-1]["reason"] == "budget"


@pytest.mark.ranks
def test_one_run_is_started_and_its_output_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = [*words_of(tmp_path, "mine", 2), "launch=horovodrun"]
    assert train.run(given) == 0
    out = capfd.readouterr().out
    assert "\nexchange  allreduce" in out and "next: hvdllm sample" in out
    assert "]<stdout>:" not in out, "rank 0's lines, samples among them, can be copied"
    (start,) = records(tmp_path / "runs" / "mine", "run")
    assert start["world"] == 2
    assert train.run(given) == 0
    assert "has finished" in capfd.readouterr().out
    assert len(records(tmp_path / "runs" / "mine", "run")) == 1


@needs_lab
@pytest.mark.ranks
def test_points_train_over_the_labs_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = f"hvdllm-{os.getpid()}-", []

    def watched(command: list[str], env: dict[str, str], *rest: Any) -> int:
        seen.append((command[:3], [name for name in lab.names() if name.startswith(own)], env["GLOO_SOCKET_IFNAME"]))
        assert Path(env["PATH"].split(os.pathsep)[0], "ssh").exists()
        return start(command, env, *rest)

    start = local.run
    monkeypatch.setattr(local, "run", watched)
    given = words(tmp_path, "launch=horovodrun", "launch.link=200mbit", "exchange=allreduce,sharded")
    out = run(capsys, "-m", *given)
    for name in ("exchange=allreduce", "exchange=sharded"):
        (record,) = records(tmp_path / "runs" / "s" / name, "run")
        assert record["world"] == 2 and f"{name}  done" in out
    mine = [own + name for name in ("h1", "h2", "sw")]
    assert seen == [(["ip", "netns", "exec"], mine, "eth0")] * 2
    assert not [name for name in lab.names() if name.startswith(own)]


# ------------------------------------------------------------------ signals
def started(tmp: Path, *more: str) -> Job:
    """A sweep of two points too long to end."""
    return Job([*HVDLLM, "train", "-m", *words(tmp, "seed=0,1", *more, steps=10**6)])


HOW = [("local", []), pytest.param("horovodrun", ["launch=horovodrun"], marks=pytest.mark.ranks)]


@pytest.mark.parametrize(("how", "more"), HOW)
def test_ctrl_c_saves_what_runs_begins_no_more_and_the_same_command_goes_on(
    how: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (tmp_path / "runs" / "s" / f"seed={k}" for k in (0, 1))
    with started(tmp_path, *more) as job:
        job.until(lambda: len(records(first, "commit")) > 2)
        job.signal(signal.SIGINT)
        done = job.wait()
        job.until_gone(10)
    assert done.code == STOPPED, done.out
    assert "asking what runs to save and to end" in done.out
    (end,) = records(first, "end")
    assert end["reason"] == "stop" and (first / "checkpoints").is_dir() and not second.exists()
    assert f"[1/2] seed=0  stopped at {end['tokens']:,} tokens" in done.out
    assert "the same command goes on with what is missing" in done.out
    steps = end["tokens"] // BATCH + 2
    if how == "local":
        out = run(capsys, "-m", *words(tmp_path, "seed=0,1", "keep=1", steps=steps))
        assert "[1/2] seed=0  goes on" in out and "[2/2] seed=1  begins" in out
        assert f"resumed from {first}/checkpoints" in records(first, "event")[-1]["what"]
        assert [records(run, "end")[-1]["tokens"] for run in (first, second)] == [steps * BATCH] * 2


@pytest.mark.parametrize(
    ("how", "more"), [HOW[0], pytest.param(*HOW[1].values, marks=(pytest.mark.ranks, pytest.mark.thorough))]
)
def test_nothing_outlives_a_sweep_that_is_killed_or_told_twice(how: str, more: list[str], tmp_path: Path) -> None:
    first = tmp_path / "runs" / "s" / "seed=0"
    with started(tmp_path, *more) as job:
        job.until(lambda: len(records(first, "commit")) > 0)
        os.kill(job.process.pid, signal.SIGKILL)
        job.until_gone(30)
    if how == "local":
        return
    with started(tmp_path, *more, "exchange=delayed", "launch.sweep=t") as job:
        job.until(lambda: len(records(tmp_path / "runs" / "t" / "seed=0", "commit")) > 0)
        for pid in job.pids().keys() - {job.process.pid}:  # so that the first ask cannot be obeyed
            os.kill(pid, signal.SIGSTOP)
        job.signal(signal.SIGINT)
        job.until(lambda: "Ctrl-C again ends it at once" in job.out)
        job.signal(signal.SIGINT)
        assert job.wait(60).code == 130
        job.until_gone(10)


def test_what_a_launcher_left_behind_is_ended(tmp_path: Path) -> None:
    """As the ranks of mpirun, which lose their parent and have sessions of their own."""
    orphan = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    code = local.run(
        [sys.executable, "-c", f"{orphan}; raise SystemExit(3)"], os.environ, tmp_path / "log", threading.Event(),
        lambda pid, mark: None,
    )  # fmt: skip
    assert code == 3
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if _says(pid) == "sleep\x00600"]


def _says(pid: Path) -> str:
    try:
        return (pid / "cmdline").read_text().strip("\0")
    except OSError:
        return ""
