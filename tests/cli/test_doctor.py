"""hvdllm doctor: a broken thing is a line with the command that mends it, never a crash of doctor itself."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from hvdllm.cli import doctor

TORCH = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
GPUS = {"version": "2.13.0+cu130", "cuda": "13.0", "devices": ["NVIDIA H100"] * 2, "nccl": "2.30.7"}
HOROVOD = {"version": "0.28.1", "built": ["mpi", "gloo"], "libmpi": ["/usr/lib/libmpi.so.40.30.4"]}
MPI4PY = {"version": "4.1.2", "library": "Open MPI v4.1.4", "libmpi": ["/usr/lib/libmpi.so.40.30.4"]}


WANDB = {"version": "0.31.0", "key": True}
RAY = {"version": "2.60.0", "nodes": 2, "cpus": 8, "gpus": 0}
SAYS = {  # what commands print
    "mpirun --version": "mpirun (Open MPI) 4.1.4\n",
    "sbatch --version": "slurm-wlm 22.05.8\n",
    "srun --mpi=list": "MPI plugin types are...\n\tnone\n\tpmix\n",
}


def run_doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from hvdllm.cli import doctor; code = doctor.run(sys.argv[1:]); "
    code += "assert not {'torch', 'horovod', 'mpi4py'} & set(sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)


@pytest.mark.ranks
def test_this_machine() -> None:
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert done.returncode == (0 if report["main_job"] else 1)
    assert report["main_job"], rows
    assert rows["two ranks"]["mark"] == "ok"
    assert rows["Horovod"]["found"].startswith("0.28.1 with ")
    assert "gloo" in rows["Horovod"]["found"]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("import os; os.abort()", "killed by signal 6"),
        ("raise ImportError('libmpi.so.40: cannot open shared object file')", "cannot open shared object file"),
    ],
)
def test_a_broken_horovod_stops_the_main_job_not_doctor(tmp_path: Path, broken: str, found: str) -> None:
    (tmp_path / "horovod" / "torch").mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (tmp_path / "horovod" / "torch" / "__init__.py").write_text(broken)
    done = run_doctor("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (row,) = (row for row in report["rows"] if row["name"] == "Horovod")
    assert not report["main_job"]
    assert row["mark"] == "broken"
    assert row["mend"] == "jobs/setup.sh"
    assert row["found"].startswith("does not load: ")
    assert found in row["found"]


def examined(
    monkeypatch: pytest.MonkeyPatch,
    commands: Mapping[str, str] = MappingProxyType({}),
    absent: tuple[str, ...] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    **facts: dict[str, Any],
) -> dict[str, doctor.Row]:
    """The table for a machine where the probes found these facts, commands print this, and two ranks add up."""
    found = {doctor.TORCH: TORCH, doctor.HOROVOD: HOROVOD, doctor.MPI4PY: MPI4PY, doctor.WANDB: WANDB, doctor.RAY: RAY}
    found |= {getattr(doctor, name): value for name, value in facts.items()}
    monkeypatch.setattr(doctor, "probe", found.get)
    monkeypatch.setattr(doctor, "two_ranks", lambda horovod: doctor.Row("two ranks", "add up"))
    monkeypatch.setattr(doctor, "launcher", lambda: "/bin/horovodrun")
    says = {**SAYS, **commands}
    monkeypatch.setattr(doctor, "output", lambda words, seconds=0: says[" ".join([Path(words[0]).name, *words[1:]])])
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path="": None if name in absent else f"/usr/bin/{name}")
    for name in ("WANDB_MODE", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {row.name: row for row in doctor.examine()}


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = examined(monkeypatch)
    assert {row.mark for row in rows.values()} == {"ok"}
    assert "the same library as Horovod's" in rows["mpi4py"].found
    assert doctor.run([]) == 0
    assert "The main job can run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "name", "mark", "mend"),
    [
        ({"TORCH": {"error": "No module named 'torch'"}}, "torch", "broken", "jobs/setup.sh"),
        ({"HOROVOD": {"error": "No module named 'horovod'"}}, "Horovod", "broken", "jobs/setup.sh"),
        ({"TORCH": GPUS}, "NCCL", "lacking", "jobs/setup.sh --nccl"),
        ({"HOROVOD": HOROVOD | {"built": ["gloo"], "libmpi": []}}, "MPI", "lacking", "jobs/setup.sh --cpu"),
        ({"MPI4PY": MPI4PY | {"libmpi": ["/opt/libmpi.so.40"]}}, "mpi4py", "lacking", "--no-binary mpi4py"),
        ({"MPI4PY": {"error": "cannot load MPI library"}}, "mpi4py", "lacking", "pip install mpi4py"),
        ({"WANDB": {"error": "No module named 'wandb'"}}, "W&B", "lacking", "pip install wandb"),
        ({"WANDB": WANDB | {"key": False}}, "W&B", "lacking", "wandb login"),
        ({"RAY": {"error": "No module named 'ray'"}}, "Ray", "lacking", "pip install 'hvdllm[ray]'"),
        ({"RAY": RAY | {"nodes": 0}}, "Ray", "lacking", "ray start --address=HEAD:6379"),
    ],
)
def test_each_lack_has_its_command(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, dict[str, Any]], name: str, mark: str, mend: str
) -> None:
    rows = examined(monkeypatch, **facts)
    assert rows[name].mark == mark
    assert mend in rows[name].mend
    assert rows[name].found.startswith("missing") == ("No module" in str(facts))
    assert [row.name for row in rows.values() if row.mark != "ok"] == [name]
    assert doctor.run([]) == (1 if mark == "broken" else 0)


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "" if name == "tokenizers" else "1.0")
    row = examined(monkeypatch)["libraries"]
    assert (row.mark, row.mend) == ("broken", "pip install tokenizers")


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl = HOROVOD | {"built": ["mpi", "gloo", "nccl"]}
    rows = examined(monkeypatch, TORCH=GPUS, HOROVOD=nccl)
    assert rows["torch"].found == "2.13.0+cu130 on 2 x NVIDIA H100"
    assert rows["CUDA"].found == "2 GPUs; torch built for 13.0; compiler /usr/bin/nvcc"
    assert rows["NCCL"].found == "built into Horovod, with torch's 2.30.7"
    assert {row.mark for row in rows.values()} == {"ok"}


@pytest.mark.parametrize(
    ("machine", "name", "found", "mend"),
    [
        ({"absent": ("sbatch",)}, "Slurm", "no sbatch on PATH", "module load slurm"),
        ({"commands": {"sbatch --version": "sbatch: fatal: no source\n"}}, "Slurm", "no source", "export SLURM_CONF"),
        ({"commands": {"srun --mpi=list": "\tnone\n\tpmi2\n"}}, "PMIx", "unknown to srun", "launch.how=gloo"),
        ({"TORCH": GPUS, "absent": ("nvcc",)}, "NCCL", "without it", "CUDA_HOME=..., then jobs/setup.sh --nccl"),
    ],
)
def test_a_cluster_lacks(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], name: str, found: str, mend: str
) -> None:
    rows = examined(monkeypatch, **machine)
    assert [row.name for row in rows.values() if row.mark == "lacking"] == [name]
    assert found in rows[name].found
    assert mend in rows[name].mend
    assert doctor.run([]) == 0


def test_where_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(monkeypatch)["Slurm"].found == "slurm-wlm 22.05.8, inside no job"
    inside = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "WANDB_MODE": "offline"}
    rows = examined(monkeypatch, environment=inside, WANDB=WANDB | {"key": False})
    assert rows["Slurm"].found == "slurm-wlm 22.05.8, inside job 7, nodes: 2"
    assert (rows["W&B"].found, rows["W&B"].mark) == ("0.31.0, offline by WANDB_MODE=offline", "ok")
    assert "lo 127.0.0.1" in rows["interfaces"].found


def test_the_loopback_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.network, "addresses", dict)
    row = examined(monkeypatch)["interfaces"]
    assert (row.found, row.mark, row.mend) == ("none is up", "lacking", "as root: ip link set lo up")
