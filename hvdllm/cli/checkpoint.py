"""`hvdllm checkpoint list RUN` and `hvdllm checkpoint verify RUN`: what a run goes on from, and whether it is whole.

The exit code of `verify` is 1 if something that was written is damaged. Neither needs torch nor Horovod.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

from hvdllm.paths import argument
from hvdllm.plain import Json

FINAL = Path("final", "model.safetensors")


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser("hvdllm checkpoint", description="The checkpoints of a run.")
    parser.add_argument(
        "what", choices=("list", "verify"), help="list: what is there; verify: read all of it, and compare the sums"
    )
    parser.add_argument("run", type=argument, help="folder of the run, runs/<name>")
    parser.add_argument("--step", type=int, help="only the checkpoint of this step")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    given = parser.parse_args(argv)
    rows = checkpoints(given.run, given.step)
    if given.what == "verify":
        for row in rows:
            row["broken"] = problem_of(Path(row["path"]))
        rows = [row for row in rows if Path(row["path"]).exists()]  # a run that trains deletes old checkpoints
    problems = sum(row.get("broken") is not None for row in rows)
    if given.json:
        for row in rows:
            print(json.dumps(row))
        return min(1, problems)
    show(rows, given.run, verified=given.what == "verify")
    if given.what == "verify" and given.step is None:
        whole = [row["path"] for row in rows if row["step"] is not None and row["broken"] is None]
        print(f"a run that goes on begins from {whole[-1]}" if whole else "there is no whole checkpoint to go on from")
    return min(1, problems)


def checkpoints(folder: Path, step: int | None = None) -> list[Json]:
    """What is known of each checkpoint, oldest first, and of the weights in final/, without reading the tensors.

    Raises UserError if there is none.
    """
    from hvdllm.checkpoint.whole import steps
    from hvdllm.errors import UserError

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give that of a run, runs/<name>")
    paths = [path for path in steps(folder) if step is None or int(path.name) == step]
    paths += [folder / FINAL] * (step is None and (folder / FINAL).exists())
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # a run that trains deletes old checkpoints
            found.append(about(path))
    if not found:
        which = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise UserError(f"{folder} does not have {which}: look into {folder / 'checkpoints'}")
    return found


def about(path: Path) -> Json:
    """What is known of a checkpoint, or of a file of weights, without reading its tensors."""
    from hvdllm.checkpoint.whole import read_state
    from hvdllm.errors import UserError

    row: Json = {"path": str(path), "step": None, "tokens": None, "ranks": None}
    if path.is_dir():
        row["step"] = int(path.name)
        try:
            state = read_state(path)
            row["ranks"] = len(state["mine"])
            row["tokens"] = state["shared"].get("tokens")
        except UserError:
            pass  # verify says what is wrong
    files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path]
    row["bytes"] = sum(each.stat().st_size for each in files)
    row["written"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(path.stat().st_mtime))
    return row


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or with a file of weights that has a sum beside it; None if it is whole."""
    from hvdllm import sums, untrusted
    from hvdllm.checkpoint.whole import broken

    if path.is_dir():
        return broken(path)
    try:
        return sums.changed(path, path.parent)
    except (OSError, untrusted.Unfit) as error:
        return f"it cannot be read ({error})"


def show(rows: list[Json], folder: Path, verified: bool) -> None:
    """Prints a table."""
    from rich.table import Table

    from hvdllm import screen

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("step", "tokens", "ranks", "MiB"):
        table.add_column(name, justify="right")
    table.add_column("written")
    table.add_column("state" if verified else "folder", overflow="fold")
    for row in rows:
        cells = ["final" if row["step"] is None else f"{row['step']:,}"]
        cells += [f"{row[name]:,}" if isinstance(row[name], int) else "" for name in ("tokens", "ranks")]
        cells += [f"{row['bytes'] / 2**20:,.1f}", row["written"].replace("T", " ")]
        table.add_row(*cells, (row["broken"] or "whole") if verified else str(Path(row["path"]).relative_to(folder)))
    screen.console(sys.stdout).print(table)
