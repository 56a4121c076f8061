"""A sample of jobs/bench/fault_matrix.sh, and how a rank that stands still, or is gone, is told of."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest
from fault_matrix import Case, pairs, run
from launch import BATCH, HVDLLM, Job, launch, meddled, records, slots, words_of

from hvdllm.faults import MODES, PHASES

SAMPLE = [
    ("allreduce", "exchange", "exception"), ("acco", "update", "exception"), ("delayed", "forward", "kill"),
    ("sharded", "save", "kill"), ("diloco", "start", "kill"), ("streaming_diloco", "shutdown", "exit"),
    ("local_sgd", "data", "exit"), ("delayed", "evaluation", "memory"), ("sharded", "save", "disk"),
    ("acco", "shutdown", "stop"), ("allreduce", "update", "hang"),
]  # fmt: skip
MORE = [
    ("fedavg", "data", "stop"),
    ("diloco", "forward", "hang"),
    ("ddp", "forward", "hang"),
    ("horovod", "exchange", "stop"),
    ("parameter_server", "data", "kill"),
]


def fault(text: str, *more: str) -> list[str]:
    return ["debug=faults", f'debug.fault="{text}"', *more]


def test_the_sample_has_every_phase_and_mode() -> None:
    assert {phase for _, phase, _ in SAMPLE} == {*PHASES} and {mode for _, _, mode in SAMPLE} == {*MODES}


def test_in_pairs_any_two_meet() -> None:
    chosen = pairs(["a", "b", "c"])
    assert len(chosen) < 2 * len(PHASES) * len(MODES)
    assert {(c.phase, c.mode) for c in chosen} == {(phase, mode) for phase in PHASES for mode in MODES}
    assert {(c.exchange, c.mode) for c in chosen} == {(name, mode) for name in "abc" for mode in MODES}
    assert {(c.exchange, c.phase) for c in chosen} == {(name, phase) for name in "abc" for phase in PHASES}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case", [*SAMPLE, *(pytest.param(case, marks=pytest.mark.thorough) for case in MORE)], ids="-".join
)
def test_a_broken_rank_ends_the_job_and_is_named(case: tuple[str, str, str], tmp_path: Path) -> None:
    assert run(Case(*case), tmp_path, "a").problem == ""


@pytest.mark.ranks
def test_a_stopped_rank_is_waited_for_if_the_user_wants_that(tmp_path: Path) -> None:
    """It is told once, and the run goes on when the rank does."""
    more = fault("rank=1,step=3,phase=forward,mode=stop", "hang_after=2", "on_hang=wait")
    with Job([*HVDLLM, "train", *words_of(tmp_path, "a", 6, *more)], "gloo", 2) as job:
        job.until(lambda: "the job waits on" in job.out)
        os.kill(job.rank(1), signal.SIGCONT)
        done = job.wait()
    assert done.code == 0 and done.out.count("rank 1 on host") == 1, done.out
    run = tmp_path / "runs" / "a"
    assert records(run, "end")[-1]["reason"] == "budget" and len(records(run, "commit")) == 6
    assert "in land" in (run / "stacks-rank-0.txt").read_text()
    assert "rank 1 on host" in (run / "log.txt").read_text() and not list(run.glob("beats-*"))


@pytest.mark.ranks
@pytest.mark.thorough
def test_a_slow_save_and_a_slow_first_step_alarm_nobody(tmp_path: Path) -> None:
    """Both take four times hang_after, while the other rank waits."""
    words = words_of(tmp_path, "a", 6, "hang_after=1", f"save_every={3 * BATCH}")
    done = launch(meddled(words, long_s=4.0), "gloo", 2)
    assert "on host" not in done.out and len(records(tmp_path / "runs" / "a", "save")) == 2


@pytest.mark.ranks
def test_ranks_that_no_launcher_ends_end_by_themselves(tmp_path: Path) -> None:
    """As under srun without --kill-on-bad-exit: a stopped rank is killed by its neighbour, and who waited ends."""
    more = fault("rank=1,step=3,phase=data,mode=stop", "hang_after=3")
    command, (point, places) = [*HVDLLM, "train", *words_of(tmp_path, "a", 6, *more)], slots("gloo", 2)
    with closing(point), Job(command, **places[0]) as waits, Job(command, **places[1]) as stopped:
        done = waits.wait()
        assert stopped.wait().code == -9
    assert done.code == 1 and "in step 3, phase data: it no longer answers" in done.out.splitlines()[-1]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "how", ["gloo", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("mpi", "torchrun"))]
)
def test_below_the_traceback_of_the_launcher_stands_which_rank_failed(how: str, tmp_path: Path) -> None:
    more = fault("rank=1,step=3,phase=forward,mode=kill", f"save_every={2 * BATCH}")
    with Job([*HVDLLM, "train", *words_of(tmp_path, "a", 6, *more)], f"real {how}", 2) as job:
        job.process.wait(120)
        said = "rank 1 on host"
        job.until_gone()
        lines = [line for line in job.out.splitlines() if line]
    assert lines[-1].startswith("hvdllm: ") and said in lines[-1] and "in step 3, phase forward" in lines[-1]
    assert "goes on from the last checkpoint" in lines[-1]


@pytest.mark.ranks
@pytest.mark.parametrize("signals", [(signal.SIGSEGV, "Segmentation fault")])
def test_a_rank_that_crashes_says_where(signals: tuple[int, str], tmp_path: Path) -> None:
    more = fault("rank=1,step=3,phase=forward,mode=stop", "hang_after=100")
    with Job([*HVDLLM, "train", *words_of(tmp_path, "a", 6, *more)], "gloo", 2) as job:
        job.until(lambda: "debug.fault" in job.out)
        os.kill(job.rank(1), signals[0])
        os.kill(job.rank(1), signal.SIGCONT)
        done = job.wait()
    assert f"crashed in step 3, phase forward (Fatal Python error: {signals[1]}); its stack is in" in done.out
    assert "in commit" in (tmp_path / "runs" / "a" / "stacks-rank-1.txt").read_text()


@pytest.mark.ranks
def test_a_run_that_is_refused_leaves_no_folder_and_names_nobody(tmp_path: Path) -> None:
    words = words_of(tmp_path, "a", 6, "init_from=nowhere")
    done = launch([*HVDLLM, "train", *words], "gloo", 2, code=None)
    assert "on host" not in done.out and not (tmp_path / "runs" / "a").exists(), done.out
