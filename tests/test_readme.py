"""Every command of the README but jobs/test.sh is run, with smaller budgets and this machine in place of the nodes;
those much like another by jobs/test.sh --all alone."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# The whole set-up in a new environment is what test_wheel.py does; jobs/test.sh is what runs this test.
ELSEWHERE = ("python3 -m venv", "jobs/test.sh", ". .venv/bin/activate")
FEWER = {  # points of a sweep
    "seed=0,1,2": "seed=0",
    "exchange=allreduce,delayed,acco": "exchange=allreduce,acco",
    "optim.lr=1e-3,2e-3": "optim.lr=1e-3",
    "hydra.sweeper.n_trials=4": "hydra.sweeper.n_trials=2",
}
ALIKE = (  # what other commands and tests start too
    "bench exchange", "exchange=acco budget", "optim=nadam", "exchange=ddp", "local_steps=10 wire=bf16", "name=uneven",
    "size=8 exchange=acco", "slow=[1:4,3:2]", "track=tensorboard",
)  # fmt: skip
SMALL = ["model.layers=1", "model.width=32", "device.threads=1", "eval_tokens=2048", "sample_tokens=8"]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith(ELSEWHERE)]


def test_the_readme_has_commands_of_every_kind() -> None:
    kinds = {
        word for line in commands() for word in ("quickstart", "horovodrun --gloo", "mpirun", "doctor") if word in line
    }
    assert kinds == {"quickstart", "horovodrun --gloo", "mpirun", "doctor"}
    assert "python3 -m venv ~/hvdllm-try && . ~/hvdllm-try/bin/activate && pip install . && hvdllm train" in README


def test_the_batch_files_it_names_are_there() -> None:
    """Run by tests/launching/test_slurm_jobs.py."""
    named = set(re.findall(r"jobs/\S+\.(?:sh|sbatch)", README))
    assert "jobs/slurm/train.sbatch" in named and all((ROOT / name).exists() for name in named)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder to work in, where the README's relative paths exist."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "hvdllm").symlink_to(ROOT / "hvdllm")
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "bin").mkdir()
    (folder / "bin" / "horovodrun").symlink_to(ROOT / "tests" / "ranks" / "horovodrun")  # starts sooner
    return folder


def marked(line: str) -> Any:
    return pytest.param(line, marks=pytest.mark.thorough) if any(words in line for words in ALIKE) else line


@pytest.mark.ranks
@pytest.mark.parametrize("line", [marked(line) for line in commands()])
def test_command(line: str, desk: Path) -> None:
    words = shlex.split(line)
    train = "train" in words and "--help" not in words and "--cfg" not in words
    if words[0] == "jobs/quickstart.sh":
        words[0] = str(ROOT / words[0])
        words.append(f"runs_dir={desk}/runs")
        train = True
    sweep = "-m" in words and "train" in words[:2]
    if sweep:
        words = [FEWER.get(word, word) for word in words]
    if train:  # a smaller budget, that of the resumed run above that of the run it goes on with
        going_on = any(word.startswith("resume=") for word in words)
        words = [word for word in words if not word.startswith("budget_tokens=")]
        words += [f"budget_tokens={30000 if going_on else 20000}", *([] if going_on else SMALL)]
    if "-H" in words:
        at = words.index("-H")
        words[at + 1] = "localhost:2"
        del words[words.index("--network-interfaces") : words.index("--network-interfaces") + 2]
    if "bench" in words:
        if "--seconds" in words:
            words[words.index("--seconds") + 1] = "1"
        else:  # the lab, on the loopback and with the reference alone
            words += ["--link", "none", "--exchanges", "allreduce", "--steps", "3", "--repetitions", "1"]
        words += SMALL[:3]
    environment = {
        **os.environ,
        "PATH": f"{desk}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    if shutil.which("ssh") is None:
        environment["OMPI_MCA_plm"] = "isolated"
    done = subprocess.run(words, cwd=desk, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    if sweep:
        assert "validation loss" in done.stdout and "hvdllm report runs/" in done.stdout
    elif train:
        assert "tokens" in done.stdout and "next: hvdllm sample" in done.stdout
