"""A world of one, asks, and what signals mean after and before a run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hvdllm.errors import UserError
from hvdllm.world import signals
from hvdllm.world.base import Asks
from hvdllm.world.detect import Place, place
from hvdllm.world.single import SingleWorld

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture
def asks() -> Iterator[Asks]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield Asks()
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.TERMINATED.clear()


def test_alone_everything_is_there_at_once() -> None:
    world, x = SingleWorld(), torch.arange(3.0)
    for kind in (world.sum, world.scatter, world.gather, world.alltoall, world.broadcast, world.adasum):
        flight = kind(x, "a")
        assert flight.landed() and flight.land() is x
    assert torch.equal(x, torch.arange(3.0)) and world.texts("a", "b") == ["a"] and world.bytes_sent == 0
    assert world.split([(0,)], "d").size == 1 and world.drive(lambda: 7).land() == 7
    world.agree(None, "c")
    with pytest.raises(UserError, match="no GPU"):
        world.agree("no GPU", "c")
    assert world.asks is not SingleWorld().asks


def test_taking_leaves_nothing_behind() -> None:
    asks = Asks(save=True)
    assert asks.take() == Asks(stop=False, save=True) and asks.take() == Asks()
    asks.stop = True
    assert asks.take() == Asks(stop=True, save=False) and asks == Asks()


def test_a_scheduler_may_ask_twice_and_only_ctrl_c_ends_at_once(asks: Asks) -> None:
    signals.listen(asks, alone=True)
    for _ in range(2):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pytest.fail("a second SIGTERM is no Ctrl-C")
        assert asks == Asks(stop=True, save=True)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0)
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in NUMBERS)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, (4, 1, 2)),
        ({"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x2), 3", "SLURM_NODEID": "2"}, (7, 1, 3)),
        ({"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)", "SLURM_NODEID": "2"}, (7, 1, 2)),
        # A step is a part of its job: the step's own count comes first.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "2"}, (2, 1, 2)),
        ({"SLURM_NTASKS": "2"}, (2, 1, 2)),
    ],
)
def test_slurm(env: dict[str, str], expected: tuple[int, int, int]) -> None:
    here = place({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "PMIX_RANK": "1", "SLURM_LOCALID": "1", **env})
    assert here == Place("srun", 1, expected[0], expected[1], expected[2])


def test_torchrun_is_seen_before_mpi_and_horovod_before_both() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    mpi = {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    assert place({**torchrun, **mpi}).launcher == "torchrun"
    horovod = {f"HOROVOD_{name}": "1" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    assert place({**torchrun, **mpi, **horovod}).launcher == "horovodrun"


@pytest.mark.parametrize(("name", "watched"), [("mpirun", 1), ("raylet", 1), ("my-script", 0)])
def test_the_launcher_is_found_among_the_ancestors(tmp_path: Path, name: str, watched: int) -> None:
    code = "from hvdllm.world.signals import up_to_launcher; print(len(up_to_launcher()))"
    # Run from a daemon's place, so that what started the tests is no ancestor.
    script = tmp_path / name
    script.write_text(f"#!/bin/sh\nsleep 0.3\n'{sys.executable}' -c '{code}' > '{tmp_path}/out'\n:\n")
    script.chmod(0o755)
    subprocess.run(["setsid", "-f", str(script)], check=True)
    out = tmp_path / "out"
    for _ in range(600):
        if out.exists() and out.read_text():
            break
        signal.sigtimedwait([], 0.05)
    assert out.read_text() == f"{watched}\n"
