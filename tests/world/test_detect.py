"""Which launcher started us, from environments as the launchers make them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdllm.errors import UserError
from hvdllm.world import signals
from hvdllm.world.base import Asks, first_problem
from hvdllm.world.detect import Place, place, started

HOROVOD = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
MPI = {f"OMPI_COMM_WORLD_{k}": v for k, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2312", strict=True)}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NODEID": "1"}
PMIX = {"PMIX_RANK": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Place()),
        (HOROVOD, Place("horovodrun", 1, 4, 1, 2)),
        ({**MPI, **HOROVOD}, Place("horovodrun", 1, 4, 1, 2)),
        (TORCHRUN, Place("torchrun", 3, 4, 1, 2)),
        ({**TORCHRUN, **HOROVOD}, Place("horovodrun", 1, 4, 1, 2)),
        ({**MPI, **STEP, **PMIX, **TORCHRUN}, Place("torchrun", 3, 4, 1, 2)),
        ({k: v for k, v in TORCHRUN.items() if k != "TORCHELASTIC_RUN_ID"}, Place()),  # numbers of nobody known
        (MPI, Place("mpirun", 2, 3, 1, 2)),
        ({**STEP, **PMIX}, Place("srun", 3, 5, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Place()),  # a batch script without srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Place()),
    ],
)
def test_place(env: dict[str, str], expected: Place) -> None:
    assert place(env) == expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"HOROVOD_RANK": "1"}, "HOROVOD_SIZE"),
        (STEP, "--mpi=pmix"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "torchrun is incomplete .* WORLD_SIZE"),
        (PMIX, "PMIx"),
    ],
)
def test_ranks_that_could_not_find_each_other_are_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        place(env)


def test_first_problem() -> None:
    assert first_problem(["", ""]) is None
    assert first_problem(["no GPU", "no GPU"]) == "no GPU"
    assert first_problem(["", "no GPU"]) == "on rank 1: no GPU"


@pytest.fixture
def asks() -> Iterator[Asks]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield Asks()
    signals.TERMINATED.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_only_ask(asks: Asks) -> None:
    signals.listen(asks, alone=False)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert asks.take() == Asks(stop=False, save=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        os.kill(os.getpid(), number)
        assert asks.stop
    assert asks.take() == Asks(stop=True, save=True) and asks == Asks()


def test_alone_a_second_interrupt_ends_at_once(asks: Asks) -> None:
    signals.listen(asks, alone=True)
    os.kill(os.getpid(), signal.SIGINT)
    assert asks.stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.parametrize(
    ("env", "alone"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, True),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "4"}, False),
        ({"MV2_COMM_WORLD_RANK": "3"}, False),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}, False),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0",
          "HOROVOD_LOCAL_SIZE": "1"}, None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, True),
    ],
)  # fmt: skip
def test_ranks_of_a_launcher_that_is_not_known_do_not_each_train_alone(env: dict[str, str], alone: bool | None) -> None:
    if alone is False:
        with pytest.raises(UserError, match="know nothing of each other"):
            place(env)
    else:
        assert place(env).launcher == ("none" if alone else "horovodrun")


def test_a_terminal_that_is_gone_asks_for_a_stop_and_nohup_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.listen(asks := Asks(), alone=True)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not asks.stop
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signals.listen(asks, alone=True)
        os.kill(os.getpid(), signal.SIGHUP)
        assert asks.stop and asks.save
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_process_that_nobody_has_collected_is_gone() -> None:
    """A container's first process may never collect a rank that was killed, and its run's folder would stay locked."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert started(process.pid) == started(process.pid) != ""
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert started(process.pid) == "" and Path(f"/proc/{process.pid}").exists()
