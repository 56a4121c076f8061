"""`hvdllm track sync RUN...`: sends the offline W&B runs in run folders to the server, by W&B's own `wandb sync`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from hvdllm import untrusted
from hvdllm.errors import RunError, UserError
from hvdllm.paths import argument

ANSWER_S = 10.0  # seconds that a server may take to accept a connection


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError or RunError."""
    parser = argparse.ArgumentParser("hvdllm track", description="What is between a run and its trackers.")
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="send what was tracked offline by track=wandb to the W&B server")
    sync.add_argument("runs", nargs="+", type=argument, metavar="RUN", help="folder of a run, runs/<name>")
    sync.add_argument("--limit", type=float, default=1800.0, metavar="S", help="seconds a run may take (1800)")
    given = parser.parse_args(argv)

    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        raise UserError("W&B is not installed here: pip install wandb")
    for folder in given.runs:
        if not lives(folder):
            raise UserError(f"{folder} has no W&B files: track=wandb makes them in a run's folder")
    reach(server(), ANSWER_S)
    for folder in given.runs:
        send(folder, given.limit)
        print(f"{folder}: sent")
    return 0


def lives(folder: Path) -> list[Path]:
    """W&B's folders of a run, one for each time it was started, in that order.

    Folders of online runs are among them, because such a run may have lost its server.
    """
    found = [path.parent for path in folder.resolve().glob("wandb/*run-*/run-*.wandb") if _is_ours(path, folder)]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether a file lies in this folder. A stranger's folder may link to any file, which would then be sent."""
    try:
        untrusted.opened(path, folder).close()
    except (OSError, untrusted.Unfit):
        return False
    return True


def server() -> str:
    """The address of the server that W&B would use, from the environment, its settings files or its defaults."""
    import wandb

    return str(wandb.Settings().base_url if "WANDB_BASE_URL" not in os.environ else os.environ["WANDB_BASE_URL"])


def reach(url: str, limit_s: float) -> None:
    """Raises RunError if the server does not answer, since `wandb sync` would try for ever.

    With a proxy for HTTPS nothing is checked.
    """
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    parts = urlsplit(url)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), limit_s).close()
    except (OSError, ValueError) as error:
        raise RunError(f"the W&B server {url} does not answer ({error}): nothing was sent") from None


def send(folder: Path, limit_s: float) -> None:
    """Sends the W&B runs in a folder, in at most limit_s seconds. Raises RunError, with W&B's reason, if it fails."""
    from hvdllm.track.wandb import environment

    words = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", "--include-online", *map(str, lives(folder))]
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    env = environment(folder) | {"WANDB_DIR": str(folder.resolve())} | os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise RunError(
            f"{folder}: not all was sent within {limit_s:g} s; start it again, or give a longer --limit"
        ) from None
    if process.returncode:
        said = [line.strip() for line in out.splitlines() if line.strip()]
        why = next((line for line in reversed(said) if "rror" in line), said[-1] if said else "it says nothing")
        raise RunError(f"{folder}: W&B sent nothing: {why.removeprefix('Error: ')}")
