"""Asks Slurm for the state of a job."""

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
class JobState:
    """What Slurm says of a job.

    Attributes:
        name: of the job.
        state: in Slurm's words, such as RUNNING.
        reason: why it is in that state.
        code: the exit code of its script, or 128 + the signal that ended it.
    """

    name: str
    state: str
    reason: str
    code: int


def ask(job: str) -> JobState | None:
    """The state of a job, or None if Slurm does not know it (any more).

    If the controller does not answer, the state is UNKNOWN, so the caller can ask again.
    """
    done = slurm(["scontrol", "--oneliner", "show", "job", job])
    if done.returncode:
        return None if "Invalid job id" in done.stderr else JobState("", "UNKNOWN", said(done.stderr), 0)
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout.splitlines()[0]))
    exited, killed = map(int, fields.get("ExitCode", "0:0").split(":"))
    code = exited or (128 + killed if killed else 0)
    return JobState(fields.get("JobName", ""), fields.get("JobState", "UNKNOWN"), fields.get("Reason", ""), code)


def slurm(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm, without the variables of an allocation around this process, which sbatch would pass on.

    Raises UserError if Slurm is not installed.
    """
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
    """Slurm's own message as a part of a sentence, without the names of programs before its lines."""
    lines = (line.removeprefix("error: ") for line in (part.partition(": ")[2] or part for part in text.splitlines()))
    return "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "it does not say why"
