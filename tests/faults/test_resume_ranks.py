"""A run that was stopped, killed or broken off goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from launch import (
    BATCH,
    HVDLLM,
    Job,
    curve,
    launch,
    losses,
    meddled,
    records,
    runs,
    same_bits,
    weights,
    words_of,
)

from hvdllm.errors import STOPPED

pytestmark = pytest.mark.ranks
STEPS = 12
SAVES = [f"save_every={4 * BATCH}", f"eval_every={4 * BATCH}", "keep=9"]


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.thorough), 3])
def test_stopped_at_a_checkpoint_and_resumed_is_bit_equal(n: int, tmp_path: Path) -> None:
    """With dropout, which is drawn anew from the position; at 3 ranks one with acts and one without."""
    more = [*SAVES, "model.dropout=0.1"]
    asked = {"words": words_of(tmp_path, "b", STEPS, *more), "do": {"stop": [n - 1, 5]}}
    quiet = words_of(tmp_path, "quiet", STEPS, "model.dropout=0.1")
    runs([{"words": words_of(tmp_path, "a", STEPS, *more)}, asked, {"words": quiet}], n, tmp_path)
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    stopped = records(b, "end")[-1]
    assert stopped["reason"] == "stop" and 5 * BATCH < stopped["tokens"] <= 7 * BATCH, "the second mark at the latest"
    assert not (b / "final").exists() and [r["tokens"] for r in records(b, "eval")] == [4 * BATCH], "a stop only saves"
    runs([{"words": words_of(tmp_path, "b", STEPS, *more)}], n, tmp_path)
    assert same_bits(a, b) and len(curve(a)) == STEPS
    assert [r["loss"] for r in records(a, "eval")] == [r["loss"] for r in records(b, "eval")]
    assert same_bits(a, tmp_path / "runs" / "quiet"), "acts change nothing"
    assert any("resumed" in event["what"] for event in records(b, "event"))


def test_stopped_between_two_records_the_curve_is_the_same(tmp_path: Path) -> None:
    """The record that a stop writes is off the cadence: the resumed run takes it back."""
    more = f"log_every={5 * BATCH}"
    asked = {"words": words_of(tmp_path, "b", STEPS, more), "do": {"stop": [0, 6]}}
    runs([{"words": words_of(tmp_path, "a", STEPS, more)}, asked], 1, tmp_path)
    stopped = [step for step, *_ in curve(tmp_path / "runs" / "b")]
    assert stopped[0] == 5 and 6 < stopped[-1] < 10
    runs([{"words": words_of(tmp_path, "b", STEPS, more)}], 1, tmp_path)
    assert [step for step, *_ in curve(tmp_path / "runs" / "a")] == [5, 10, 12]
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


def test_another_world_size_goes_on(tmp_path: Path) -> None:
    runs([{"words": words_of(tmp_path, "a", STEPS, *SAVES)}], 1, tmp_path)
    runs([{"words": words_of(tmp_path, "b", STEPS, *SAVES), "do": {"stop": [3, 5]}}], 4, tmp_path)
    runs([{"words": words_of(tmp_path, "b", STEPS, *SAVES)}], 3, tmp_path)
    assert losses(tmp_path / "runs" / "b") == pytest.approx(losses(tmp_path / "runs" / "a"), rel=1e-5)


def test_a_finished_run_says_so_and_a_larger_budget_goes_on(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 3)
    launch([*HVDLLM, "train", *words])
    assert "has finished" in launch([*HVDLLM, "train", *words]).out
    assert len(records(tmp_path / "runs" / "a", "run")) == 1
    launch([*HVDLLM, "train", f"resume={tmp_path}/runs/a", f"data_dir={tmp_path}/data", f"budget_tokens={5 * BATCH}"])
    assert [record["step"] for record in records(tmp_path / "runs" / "a", "commit")] == [1, 2, 3, 4, 5]
    refused = launch([*HVDLLM, "train", *words_of(tmp_path, "a", 9, "optim.lr=1")], code=2).out
    assert "optim.lr was 0.003 and is now 1.0" in refused


def test_killed_at_any_moment_it_goes_on_bit_equal(tmp_path: Path) -> None:
    """SIGKILL to launcher and ranks together, three times, wherever it hits."""
    steps = 40
    words = ["save_every=1", "keep=2"]
    runs([{"words": words_of(tmp_path, "a", steps)}], 2, tmp_path)
    run, draw = tmp_path / "runs" / "b", random.Random(time.time_ns())
    train = [*HVDLLM, "train", *words_of(tmp_path, "b", steps, *words)]
    for least in (2, 9, 16):
        with Job(train, "gloo", 2) as job:
            job.until(lambda least=least: len(records(run, "save")) >= least)
            time.sleep(draw.random() * 0.1)
            job.kill()
    launch(train, "gloo", 2)
    assert same_bits(tmp_path / "runs" / "a", run) and len(curve(run)) == steps


def test_a_killed_rank_ends_the_job_and_nothing_is_lost(tmp_path: Path) -> None:
    runs([{"words": words_of(tmp_path, "a", STEPS, *SAVES)}], 2, tmp_path)
    words = words_of(tmp_path, "b", STEPS, *SAVES)
    launch(meddled(words, kill=[1, 9]), "real gloo", 2, code=None)
    done = launch([*HVDLLM, "train", *words], "gloo", 2)
    assert "goes on" in done.out and same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


@pytest.mark.parametrize("how", ["gloo", pytest.param("mpi", marks=pytest.mark.thorough)])
def test_a_rank_that_fails_shows_its_own_error(how: str, tmp_path: Path) -> None:
    done = launch(meddled(words_of(tmp_path, "a", STEPS), fail=[1, 3]), f"real {how}", 2, code=None)
    assert "an apple fell on the fan" in done.out and "rank 1: this is a bug" in done.out
    assert "a collective failed" not in done.out and "HorovodInternalError" not in done.out


@pytest.mark.parametrize("tensor", ["blocks.0.mlp.up.weight", pytest.param(None, marks=pytest.mark.thorough)])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(tensor: str | None, tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", STEPS, "save_every=1", "keep=99")
    done = launch(meddled(words, bad=[1, 6, tensor]), "gloo", 3, code=None)
    assert done.out.count("is not finite on rank 1") >= 1 and "step 7: the gradient of `" in done.out
    assert tensor is None or f"`{tensor}`" in done.out
    run = tmp_path / "runs" / "a"
    assert records(run, "end")[-1]["reason"] == "failed"
    assert [record["step"] for record in records(run, "save")] == [1, 2, 3, 4, 5, 6], "no bad step was saved"
    if tensor:
        runs([{"words": words_of(tmp_path, "b", STEPS)}, {"words": words}], 3, tmp_path)
        assert same_bits(run, tmp_path / "runs" / "b"), "nothing was updated"


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("gloo", signal.SIGINT),
        ("mpi", signal.SIGINT),
        ("alone", signal.SIGINT),
        pytest.param("alone", signal.SIGTERM, marks=pytest.mark.thorough),
    ],
)
def test_interrupted_it_ends_saved(how: str, number: int, tmp_path: Path) -> None:
    n, run = (1 if how == "alone" else 2), tmp_path / "runs" / "a"
    steps = 60  # under mpi 4 s of them pass before the SIGTERM
    words = words_of(tmp_path, "a", steps)
    runs([{"words": words_of(tmp_path, "b", steps)}], n, tmp_path, "gloo")
    more = {"OMPI_MCA_odls_base_sigkill_timeout": "4"} if how == "mpi" else {}
    with Job(meddled(words, slow_s=0.2 if how == "mpi" else 0.1), f"real {how}", n, **more) as job:
        job.until(lambda: len(records(run, "commit")) > 3)
        job.signal(number)
        done = job.wait()
        job.until_gone()
    assert records(run, "end")[-1]["reason"] == "stop", done.out
    assert len(records(run, "save")) == 1
    if how == "alone":
        assert done.code == STOPPED
    elif how == "mpi":
        assert done.code != 0  # horovodrun --gloo may lose the codes of the ranks that it ends, and return 0
    launch([*HVDLLM, "train", *words], "gloo" if n > 1 else "alone", n)
    assert same_bits(run, tmp_path / "runs" / "b")


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", STEPS, *SAVES)
    launch(meddled(words, kill=[0, 9]), code=None)
    os.truncate(tmp_path / "runs" / "a" / "checkpoints" / "8" / "rank-00000.safetensors", 1000)
    done = launch([*HVDLLM, "train", *words])
    assert "checkpoints/8 is passed over" in done.out
    runs([{"words": words_of(tmp_path, "b", STEPS)}], 1, tmp_path)
    assert same_bits(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    assert weights(tmp_path / "runs" / "a")
