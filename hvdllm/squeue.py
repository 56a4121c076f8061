"""What Slurm says of a job."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from hvdllm.errors import UserError
from hvdllm.interpreter import found

ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """What Slurm says of a job. code: of its script, or 128 + the signal that ended it."""

    name: str
    state: str
    reason: str
    code: int


def ask(job: str) -> State | None:
    """None: Slurm knows no such job (any more). Waits out a controller that does not answer."""
    done = slurm(["scontrol", "--oneliner", "show", "job", job])
    if done.returncode:
        return None if "Invalid job id" in done.stderr else State("", "UNKNOWN", said(done.stderr), 0)
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout.splitlines()[0]))
    exited, killed = map(int, fields.get("ExitCode", "0:0").split(":"))
    code = exited or (128 + killed if killed else 0)
    return State(fields.get("JobName", ""), fields.get("JobState", "UNKNOWN"), fields.get("Reason", ""), code)


def slurm(words: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of Slurm. What an allocation around us says is not the job's: sbatch would hand it on."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    env |= found()
    try:
        return subprocess.run(words, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError(
            f"launch=slurm needs {words[0]}, which is not on PATH: start this on a login node of the cluster, or take "
            "launch=horovodrun"
        ) from None


def said(text: str) -> str:
    """Slurm's own message, as part of a sentence: without the programs' names before its lines."""
    lines = (line.removeprefix("error: ") for line in (part.partition(": ")[2] or part for part in text.splitlines()))
    return "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "it does not say why"
