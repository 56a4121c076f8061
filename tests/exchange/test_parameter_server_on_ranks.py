"""Parameter servers and their letters on real ranks over MPI."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from launch import BATCH, HVDLLM, RANKS, Job, launch, losses, meddled, records, runs, weights, words_of

pytestmark = pytest.mark.ranks
SERVER = ["exchange=parameter_server", "exchange.bucket_mb=null"]
KINDS = {
    "sync": ["exchange.staleness=0"],
    "sync-dedicated": ["exchange.staleness=0", "exchange.servers=1"],
    "bounded": ["exchange.staleness=2"],
    "async": [],
    "async-dedicated": ["exchange.servers=1", "optim=sgd"],
    "compensated": ["exchange.compensation=0.5", "exchange.staleness_aware=true"],
}
PATIENT = {"OMPI_MCA_odls_base_sigkill_timeout": "20"}  # seconds that mpirun leaves its ranks to save in


def test_letters_between_real_ranks(tmp_path: Path) -> None:
    launch([sys.executable, str(RANKS / "body_mail.py"), str(tmp_path)], "mpi", 3)
    for rank in range(3):
        for said in json.loads((tmp_path / f"{rank}.json").read_text()):
            sent = said.pop("sent")
            assert 2 * 5_000_000 * 4 < sent < 2 * 5_000_000 * 4 + 10_000
            assert said.pop("sums") == [3.0] * 5
            assert all(said.values()), said


def test_every_kind_trains_and_staleness_0_is_its_virtual_twin(tmp_path: Path) -> None:
    """In one start, one after the other: each makes a communicator of its own."""
    more = [*SERVER, "precision=fp64", f"eval_every={6 * BATCH}", f"audit_every={9 * BATCH}"]
    specs = {name: words_of(tmp_path, name, 20, *more, *words) for name, words in KINDS.items()}
    runs([{"words": words, "do": {"slow": [1, 3.0]}} for words in specs.values()], 3, tmp_path, "mpi")
    twins = {name: words_of(tmp_path, f"{name}-twin", 20, *more, *KINDS[name]) for name in ("sync", "sync-dedicated")}
    runs([{"words": [*words, "world=virtual", "world.size=3"]} for words in twins.values()], 1, tmp_path)
    for name in KINDS:
        run = tmp_path / "runs" / name
        (end,) = records(run, "end")
        assert end["reason"] == "budget" and end["tokens"] >= 20 * BATCH, name
        assert losses(run)[-1] < losses(run)[0] and end["eval_loss"] < records(run, "eval")[0]["loss"], name
        commits = records(run, "commit")
        stale = [record["staleness_max"] for record in commits]
        assert (max(stale) > 0) == (not name.startswith("sync")), name
        serves = "dedicated" in name
        assert (sum(record["micro_batches_by_rank"][2] for record in commits) == 0) == serves, name
        assert sum(record["bytes_sent"] for record in commits) > 0 and commits[1]["blocked_s"] > 0
        assert len(weights(run)) > 5
    for name in twins:
        a, b = (tmp_path / "runs" / each for each in (name, f"{name}-twin"))
        assert losses(a) == pytest.approx(losses(b), rel=1e-9)
        for key, value in weights(a).items():
            torch.testing.assert_close(value, weights(b)[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", ["mpi", pytest.param("mpirun", marks=pytest.mark.thorough)])
def test_a_killed_worker_ends_the_job_and_the_run_goes_on(how: str, tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 12, *SERVER, f"save_every={3 * BATCH}")
    done = launch(meddled(words, kill=[1, 24]), f"real {how}", 3, code=None)  # steps are pushes, about three a batch
    assert "signal 9" in done.out and "bug in hvdllm" not in done.out
    assert records(tmp_path / "runs" / "a", "save")
    launch([*HVDLLM, "train", *words], how, 3)
    assert records(tmp_path / "runs" / "a", "end")[-1]["reason"] == "budget"


def test_a_worker_that_stands_still_ends_the_run_when_its_lease_is_over(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    words = words_of(tmp_path, "a", 10_000, *SERVER, "exchange.lease_s=15", "exchange.staleness=2")
    with Job(meddled(words), "real mpirun", 3) as job:
        job.until(lambda: len(records(run, "commit")) > 3)
        os.kill(job.rank(1), signal.SIGSTOP)
        done = job.wait()
        job.until_gone()
        # Once by rank 0, and once below what mpirun prints.
        assert done.code != 0 and job.out.count("rank 1 has said nothing for 15 s (exchange.lease_s)") == 2, job.out
        assert "Traceback" not in job.out and "bug in hvdllm" not in job.out


@pytest.mark.parametrize("how", [pytest.param("loop", marks=pytest.mark.thorough), "server"])
def test_a_rank_that_fails_shows_its_own_error(how: str, tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 1000, *SERVER)
    do = {"fail": [1, 3]} if how == "loop" else {"serve_fail": [1, 7]}
    done = launch(meddled(words, **do), "mpirun", 3, code=None)
    assert ("an apple fell on the " + ("fan" if how == "loop" else "server")) in done.out
    assert "rank 1: this is a bug" in done.out and "rank 0: this is a bug" not in done.out


@pytest.mark.parametrize("kind", [pytest.param("sync", marks=pytest.mark.thorough), "async-dedicated"])
def test_a_bad_gradient_stops_all_ranks_before_it_counts(kind: str, tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 1000, *SERVER, *KINDS[kind])
    done = launch(meddled(words, bad=[1, 21, "blocks.0.mlp.up.weight"]), "mpirun", 3, code=None)
    assert "the gradient of `blocks.0.mlp.up.weight` is not finite on rank 1" in done.out
    assert done.out.count("is not finite") == 1 and "bug in hvdllm" not in done.out
    assert records(tmp_path / "runs" / "a", "end")[-1]["reason"] == "failed"


@pytest.mark.thorough
@pytest.mark.parametrize(("how", "kind"), [("mpi", "async"), ("mpirun", "async-dedicated"), ("mpi", "sync")])
def test_ctrl_c_saves_and_the_run_goes_on(how: str, kind: str, tmp_path: Path) -> None:
    """By the launcher's SIGTERM to every rank. The second life has fewer ranks."""
    run = tmp_path / "runs" / "a"
    words = words_of(tmp_path, "a", 10_000, *SERVER, *KINDS[kind])
    with Job(meddled(words, slow_s=0.02), f"real {how}", 3, **PATIENT) as job:
        job.until(lambda: len(records(run, "commit")) > 3)
        job.signal(signal.SIGINT)
        job.wait()
        job.until_gone()
    assert records(run, "end")[-1]["reason"] == "stop" and len(records(run, "save")) == 1
    tokens = records(run, "end")[-1]["tokens"]
    words = [word for word in words if not word.startswith("budget")]
    launch([*HVDLLM, "train", *words, f"budget_tokens={tokens + 6 * BATCH}"], how, 2)
    end = records(run, "end")[-1]
    assert end["reason"] == "budget" and end["tokens"] >= tokens + 6 * BATCH
    assert end["tokens_computed"] >= end["tokens"]


@pytest.mark.parametrize(
    ("how", "who"),
    [("gloo", "Gloo"), pytest.param("torchrun", "torch.distributed", marks=pytest.mark.thorough)],
)
def test_ranks_without_mpi_are_told_before_the_start(how: str, who: str, tmp_path: Path) -> None:
    done = launch([*HVDLLM, "train", *words_of(tmp_path, "a", 3, *SERVER)], how, 2, code=None)
    assert done.out.count(f"over MPI, and ranks that {who} joins have none") == 1
    assert "horovodrun --mpi -np 3 hvdllm train exchange=parameter_server" in done.out
    assert not (tmp_path / "runs").exists()


def test_one_process_is_server_and_worker(tmp_path: Path) -> None:
    for kind in ("sync", "async"):
        launch([*HVDLLM, "train", *words_of(tmp_path, kind, 12, *SERVER, *KINDS[kind])])
        (end,) = records(tmp_path / "runs" / kind, "end")
        assert end["reason"] == "budget" and losses(tmp_path / "runs" / kind)[-1] < losses(tmp_path / "runs" / kind)[0]
