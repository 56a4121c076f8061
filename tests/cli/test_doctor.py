"""hvdllm doctor: a broken thing is a line with the command that mends it, never a crash of doctor itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdllm.cli import doctor

TORCH = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
GPUS = {"version": "2.13.0+cu130", "cuda": "13.0", "devices": ["NVIDIA H100"] * 2}
HOROVOD = {"version": "0.28.1", "built": ["mpi", "gloo"], "libmpi": ["/usr/lib/libmpi.so.40.30.4"]}
MPI4PY = {"version": "4.1.2", "library": "Open MPI v4.1.4", "libmpi": ["/usr/lib/libmpi.so.40.30.4"]}


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


def examined(monkeypatch: pytest.MonkeyPatch, **facts: dict[str, Any]) -> dict[str, doctor.Row]:
    """The table for a machine where the probes found these facts, and two ranks add up."""
    found = {doctor.TORCH: TORCH, doctor.HOROVOD: HOROVOD, doctor.MPI4PY: MPI4PY}
    found |= {getattr(doctor, name): value for name, value in facts.items()}
    monkeypatch.setattr(doctor, "probe", found.get)
    monkeypatch.setattr(doctor, "two_ranks", lambda horovod: doctor.Row("two ranks", "add up"))
    monkeypatch.setattr(doctor, "launcher", lambda: "/bin/horovodrun")
    monkeypatch.setattr(doctor, "output", lambda command: "mpirun (Open MPI) 4.1.4\n")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
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
        ({"TORCH": GPUS}, "Horovod", "lacking", "jobs/setup.sh --nccl"),
        ({"HOROVOD": HOROVOD | {"built": ["gloo"], "libmpi": []}}, "MPI", "lacking", "jobs/setup.sh --cpu"),
        ({"MPI4PY": MPI4PY | {"libmpi": ["/opt/libmpi.so.40"]}}, "mpi4py", "lacking", "--no-binary mpi4py"),
        ({"MPI4PY": {"error": "cannot load MPI library"}}, "mpi4py", "lacking", "pip install mpi4py"),
    ],
)
def test_each_lack_has_its_command(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, dict[str, Any]], name: str, mark: str, mend: str
) -> None:
    rows = examined(monkeypatch, **facts)
    assert rows[name].mark == mark
    assert mend in rows[name].mend
    assert (rows[name].found == "missing") == ("No module" in str(facts))
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
    assert {row.mark for row in rows.values()} == {"ok"}
