"""Inside a Slurm job, without Slurm: what is read of an allocation, what starts the ranks, what each rank is told."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from launch import environment

from hvdllm.errors import STOPPED, UserError
from hvdllm.launch import horovodrun, inside, meeting, network, task
from hvdllm.launch.inside import Allocation

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
GPUS = {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (JOB, Allocation("7", 2, 1, "n[1-2]")),
        ({**JOB, "SLURM_TASKS_PER_NODE": "64(x2)"}, Allocation("7", 2, 1, "n[1-2]")),  # of cores: none was asked for
        ({**JOB, "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, Allocation("7", 2, 4, "n[1-2]")),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "4"}, Allocation("7", 2, 4, "n[1-2]")),
        ({**JOB, **ARRAY}, Allocation("5_2", 2, 1, "n[1-2]")),
        ({**JOB, **GPUS}, Allocation("7", 2, 1, "n[1-2]", "8", True)),
    ],
)
def test_what_slurm_gave(env: dict[str, str], expected: Allocation) -> None:
    assert inside.allocation(env) == expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "no Slurm job"),
        ({**JOB, "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"}, "2 nodes of this job have 2, 1 tasks"),
    ],
)
def test_no_job_or_unequal_nodes(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        inside.allocation(env)


def test_what_starts_the_ranks() -> None:
    here = Allocation("7", 2, 4, "n[1-2]", "8", True)
    words = " ".join(inside.by_srun(here, "pmix", ["train"]))
    assert words == (
        "srun --mpi=pmix --kill-on-bad-exit=1 --distribution=block --nodes=2 --ntasks=8 --ntasks-per-node=4 "
        "--cpus-per-task=8 --gpu-bind=none train"
    )
    plain = inside.by_srun(Allocation("7", 1, 1, "n1"), "none", ["train"])
    assert not [word for word in plain if "cpus" in word or "gpu" in word]  # without GPUs some Slurms refuse the option
    words, program = inside.by_horovodrun(here, ["n1", "n2"], "ib0", ["train"]), horovodrun.starter("gloo")
    assert words[: len(program)] == program and os.path.basename(program[-1]) == "meeting.py"
    words = words[len(program) :]
    assert " ".join(words) == "--gloo -np 8 -H n1:4,n2:4 --network-interfaces ib0 train"
    alone = inside.by_horovodrun(Allocation("7", 1, 2, "n1"), ["n1"], None, ["train"])
    assert alone[len(program) :] == ["--gloo", "-np", "2", "-H", "localhost:2", "train"]


def test_interfaces() -> None:
    assert network.variables(None) == {}
    assert network.variables("ib0,ib1") == {
        "HOROVOD_GLOO_IFACE": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0,ib1",
        "OMPI_MCA_btl_tcp_if_include": "ib0,ib1",
        "OMPI_MCA_oob_tcp_if_include": "ib0,ib1",
    }
    assert network.addresses()["lo"] == "127.0.0.1"
    assert network.towards("127.0.0.1") == "lo"


def test_what_a_task_tells_its_rank() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "1"}
    told = task.rank({**step, "SLURM_NODEID": "1"}, "10.0.0.1", 4000, "c0ffee")
    numbers = {name.removeprefix("HOROVOD_"): value for name, value in told.items() if value.isdigit()}
    assert numbers == {
        "GLOO_RENDEZVOUS_PORT": "0", "RANK": "4", "SIZE": "6", "LOCAL_RANK": "1", "LOCAL_SIZE": "3",
        "CROSS_RANK": "1", "CROSS_SIZE": "2",
    }  # fmt: skip
    assert told["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "10.0.0.1:4000/c0ffee"


def test_the_meeting_point_listens_where_it_should_and_ends() -> None:
    here = Allocation("7", 2, 1, "n[1-2]")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with inside.meeting_point(here, "lo") as told:
        address, port, secret = told.split()
        assert address == "127.0.0.1"
        env = meeting.variables(address, int(port), secret)
        url = "http://{}:{}/scope/key".format(*env.values())
        direct.open(urllib.request.Request(url, b"met", method="PUT"), timeout=10).close()
        with direct.open(url, timeout=10) as answer:
            assert answer.read() == b"met"
        for path in ("/scope/key", f"/{'0' * 32}:0/scope/key", f"/{secret}", "/", f"/{secret}:1/scope/key"):
            for method in ("GET", "PUT", "DELETE"):  # a neighbour, who knows no secret
                other = urllib.request.Request(f"http://{address}:{port}{path}", b"mine", method=method)
                with pytest.raises(urllib.error.HTTPError, match="403"):
                    direct.open(other, timeout=10)
        with direct.open(url, timeout=10) as answer:
            assert answer.read() == b"met"
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", int(port)))  # also this host, not that interface's address
    with socket.socket() as late, pytest.raises(ConnectionRefusedError):
        late.connect(("127.0.0.1", int(port)))
    with pytest.raises(UserError, match="interface nic9 is not up"), inside.meeting_point(here, "nic9"):
        pass


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sbatch: error: invalid partition\nsbatch: error: Refused: no.\n", "invalid partition; Refused: no"),
        ("", "it does not say why"),
    ],
)
def test_slurms_own_words(text: str, sentence: str) -> None:
    assert inside.said(text) == sentence


STAND_INS = {  # for Slurm's commands: they note how they were called; srun waits until scancel was
    "srun": 'echo "srun $*" >>calls; while [ ! -e told ]; do sleep .05; done; {end}',
    "scancel": 'echo "scancel $*" >>calls; touch told',
    "scontrol": 'echo "scontrol $*" >>calls',
}
TOLD, AGAIN = ["srun", "scancel --signal=TERM 5_2"], "scontrol requeue 5_2"


def in_order(tokens: int) -> str:
    """How a run ends that has saved."""
    return f'echo {tokens} >"$HVDLLM_STOP_FILE"; exit {STOPPED}'


def a_life(tmp: Path, number: int, end: str) -> tuple[int, str, list[str]]:
    """Code, output and calls of a job that gets a signal once its ranks run, which then end so."""
    for name, text in STAND_INS.items():
        (tmp / name).write_text(f"#!/bin/bash\n{text.replace('{end}', end)}\n")
        (tmp / name).chmod(0o755)
    calls = tmp / "calls"
    for left in (calls, tmp / "told"):
        left.unlink(missing_ok=True)
    env: dict[str, Any] = environment(**JOB, **ARRAY)
    env["PATH"] = f"{tmp}:{env['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "hvdllm.launch.inside", "--", "true"], env=env, cwd=tmp, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        limit = time.monotonic() + 60
        while not calls.exists() and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    lines = calls.read_text().splitlines()
    return process.returncode, out, [line if i else line.split()[0] for i, line in enumerate(lines)]


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGINT, False)])
def test_a_signal_ends_the_ranks_and_the_limit_queues_again(tmp_path: Path, number: int, again: bool) -> None:
    code, out, calls = a_life(tmp_path, number, in_order(704))
    assert calls == [*TOLD, *[AGAIN] * again] and code == STOPPED
    assert ("queued again" in out) == again
    assert bool(list(tmp_path.glob(".hvdllm-5_2.stopped"))) == again


@pytest.mark.parametrize("end", ["exit 1", "exit 0", f"exit {STOPPED}"])
def test_what_did_not_stop_in_good_order_is_not_queued_again(tmp_path: Path, end: str) -> None:
    """Also where an earlier life has: its word is not this one's."""
    (tmp_path / ".hvdllm-5_2.stopped").write_text("704 0\n")
    code, _, calls = a_life(tmp_path, signal.SIGUSR1, end)
    assert calls == TOLD and code == int(end.split()[1])
    assert not list(tmp_path.glob(".hvdllm-*"))


def test_three_lives_without_progress_end_it(tmp_path: Path) -> None:
    """Seen to catch: an idle life that counts for nothing, one that progress does not make up for."""
    for tokens in (704, 704, 704, 1408, 1408, 1408):  # at the end of each life
        life = inside.Life("7", tmp_path)
        life.path.write_text(f"{tokens}\n")
        assert life.stopped()
        life.keep()
    (tmp_path / ".hvdllm-7.stopped").rename(tmp_path / ".hvdllm-5_2.stopped")
    code, out, calls = a_life(tmp_path, signal.SIGUSR1, in_order(1408))
    assert calls == TOLD and code == 1 and "3 lives of this job came no further than 1,408 tokens" in out
    assert not list(tmp_path.glob(".hvdllm-*"))
    nothing = inside.Life("7", tmp_path)
    assert not nothing.stopped(), "nobody said so"
