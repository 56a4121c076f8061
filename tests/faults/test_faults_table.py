"""More ways to be ended: signals that repeat, launchers that die, a disk that is full, a kill behind the last save."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import BATCH, HVDLLM, Job, curve, launch, meddled, records, runs, same_bits, words_of

from hvdllm.checkpoint import read
from hvdllm.errors import STOPPED

pytestmark = pytest.mark.ranks
STEPS = 12


def test_killed_behind_the_last_checkpoint_it_still_finishes(tmp_path: Path) -> None:
    """Then the last commit's record and final/ are missing, and the only checkpoint meets the budget."""
    runs([{"words": words_of(tmp_path, "a", STEPS)}], 2, tmp_path)
    words = words_of(tmp_path, "b", STEPS, "keep=1")
    launch(meddled(words, kill=[0, STEPS]), "gloo", 2, code=None)
    run = tmp_path / "runs" / "b"
    assert len(records(run, "save")) == 1 and len(curve(run)) == STEPS - 1 and not (run / "final").exists()
    launch([*HVDLLM, "train", *words], "gloo", 2)
    assert same_bits(tmp_path / "runs" / "a", run) and len(curve(run)) == STEPS
    assert [end["reason"] for end in records(run, "end")] == ["budget"]
    assert "has finished" in launch([*HVDLLM, "train", *words]).out


def test_sigterm_twice_is_as_good_as_once(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 100), slow_s=0.3)) as job:
        job.until(lambda: len(records(run, "commit")) > 2)
        job.signal(signal.SIGTERM)
        time.sleep(0.05)
        job.signal(signal.SIGTERM)
        assert job.wait().code == STOPPED
    assert records(run, "end")[-1]["reason"] == "stop" and len(records(run, "save")) == 1


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """Also when the first one has been taken along by a round: here the second comes after the save."""
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 1000), slow_s=1.0)) as job:
        job.until(lambda: len(records(run, "commit")) > 0)
        job.signal(signal.SIGINT)
        job.until(lambda: bool(records(run, "save")))
        job.signal(signal.SIGINT)
        done = job.wait()
    assert done.code == 130 and "Ctrl-C again ends at once" in done.out
    assert "ended at once; the last checkpoint counts" in done.out and "Traceback" not in done.out


@pytest.mark.thorough
def test_mpirun_with_time_to_save_ends_saved(tmp_path: Path) -> None:
    """mpirun waits that long before its SIGTERM, and again before its SIGKILL."""
    run = tmp_path / "runs" / "a"
    mpirun = ["mpirun", "--oversubscribe", "--mca", "odls_base_sigkill_timeout", "3", "-np", "2"]
    with Job([*mpirun, *meddled(words_of(tmp_path, "a", 100), slow_s=0.2)]) as job:
        job.until(lambda: len(records(run, "commit")) > 2)
        job.signal(signal.SIGINT)
        done = job.wait()
        job.until_gone()
    assert records(run, "end")[-1]["reason"] == "stop" and len(records(run, "save")) == 1, done.out


def test_sigusr1_to_any_rank_saves_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 1000), slow_s=0.05), "gloo", 2) as job:
        job.until(lambda: len(records(run, "commit")) > 2)
        os.kill(job.rank(1), signal.SIGUSR1)
        job.until(lambda: bool(records(run, "save")))
        at = len(records(run, "commit"))
        job.until(lambda: len(records(run, "commit")) > at + 2)
    assert read.broken(next((run / "checkpoints").iterdir())) is None


@pytest.mark.thorough
def test_a_rank_killed_from_outside_ends_the_job(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 10_000), slow_s=0.02), "real mpirun", 3) as job:
        job.until(lambda: len(records(run, "commit")) > 5)
        os.kill(job.rank(1), signal.SIGKILL)
        assert job.wait().code != 0
        job.until_gone()


@pytest.mark.parametrize(
    "how", ["gloo", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("mpi", "torchrun"))]
)
def test_ranks_end_saved_when_their_launcher_is_killed(how: str, tmp_path: Path) -> None:
    """horovodrun --mpi has become `sh -c mpirun` by then, and leaves mpirun behind."""
    run = tmp_path / "runs" / "a"
    with Job(meddled(words_of(tmp_path, "a", 10_000), slow_s=0.02), f"real {how}", 2) as job:
        job.until(lambda: len(records(run, "commit")) > 3)
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait()
        job.until_gone()
    assert records(run, "end")[-1]["reason"] == "stop" and len(records(run, "save")) == 1


def test_the_first_bad_tensor_in_backward_order_is_named(tmp_path: Path) -> None:
    """The map has norms and biases behind the matrices; the backward has them where the forward has."""
    bad = [0, 1, "blocks.0.attention_norm.weight", "blocks.0.mlp.up.weight", "embed.weight"]
    done = launch(meddled(words_of(tmp_path, "a", STEPS), bad=bad), code=1)
    assert "step 2: the gradient of `blocks.0.mlp.up.weight` is not finite on rank 0" in done.out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB: three checkpoints of a tiny model do not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a full disk is made by mounting a small tmpfs, which needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_is_whole(small_disk: Path, tmp_path: Path) -> None:
    runs([{"words": words_of(tmp_path, "a", STEPS)}], 2, tmp_path)
    words = words_of(tmp_path, "b", STEPS, f"runs_dir={small_disk}", f"save_every={4 * BATCH}")
    run = small_disk / "b"
    done = launch([*HVDLLM, "train", *words, "keep=9"], "gloo", 2, code=None)
    assert done.out.count("cannot write the checkpoint of step") == 1 and "hvdllm: rank 1" not in done.out
    assert "Traceback" not in done.out.partition("hvdllm: ")[0] and "bug in hvdllm" not in done.out
    whole = read.newest(run, pytest.fail)
    assert whole is not None and not any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    launch([*HVDLLM, "train", *words], "gloo", 2)
    (small_disk / "a").symlink_to(tmp_path / "runs" / "a")
    assert same_bits(small_disk / "a", run)


def test_a_disk_without_a_byte_left_is_one_sentence(small_disk: Path, tmp_path: Path) -> None:
    """Records and the log do not fit either."""
    run = small_disk / "a"
    words = words_of(tmp_path, "a", 1000, f"runs_dir={small_disk}")
    with Job(meddled(words, slow_s=0.05)) as job:
        job.until(lambda: len(records(run, "commit")) > 2)
        subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/fill", "bs=512"], capture_output=True)
        done = job.wait()
    assert done.code == 1 and done.out.count("cannot write to") == 1, done.out
    assert "Traceback" not in done.out and "bug in hvdllm" not in done.out
