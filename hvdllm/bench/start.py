"""How long a newcomer waits: from the command to the first step, and to the end of a short run with its text."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time

from hvdllm.errors import RunError, UserError
from hvdllm.plain import Json


def measure(ranks: int, tokens: int) -> Json:
    """Starts two runs of model=tiny under horovodrun --gloo.

    The first finds its text prepared, and gives the seconds to the first step. The second prepares the text anew in an
    empty folder and trains on `tokens` tokens.

    Raises UserError if there is no horovodrun, RunError if a run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = [f"runs_dir={folder}/runs", "eval_every=0", "sample_every=0", "save_every=0"]
        first, _ = _run(ranks, [*common, "budget_tokens=1"])
        _, whole = _run(ranks, [*common, f"budget_tokens={tokens}", f"data_dir={folder}/data"])
    return {"ranks": ranks, "first_step_s": first, "tokens": tokens, "whole_s": whole}


def _run(ranks: int, settings: list[str]) -> tuple[float, float]:
    """The seconds to the first progress line, which rank 0 prints at its first commit, and those to the end."""
    command = ["horovodrun", "--gloo", "-np", str(ranks), "hvdllm", "train", *settings]
    begin, first = time.monotonic(), 0.0
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise UserError("horovodrun is not on PATH: run jobs/setup.sh and . .venv/bin/activate") from None
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not first and re.search(r"[\d,]+ tokens +\d+%", line):
            first = time.monotonic() - begin
    if process.wait() or not first:
        raise RunError(f"`{' '.join(command)}` failed: {' '.join(lines[-3:]).strip()}")
    return first, time.monotonic() - begin
