"""Facts about a run for its records: enough to repeat it, and to account for its numbers."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import hvdllm
from hvdllm import device as devices
from hvdllm.plain import Json
from hvdllm.world.base import World
from hvdllm.world.detect import LINK

PACKAGES = ("torch", "numpy", "horovod", "mpi4py", "hydra-core", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """The versions of Python, hvdllm and its main dependencies. A package that is not installed is left out."""
    found = {"python": platform.python_version(), "hvdllm": hvdllm.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def git() -> Json:
    """The commit of the clone that this code runs from, and whether its tree is dirty; both None outside a clone."""
    root = Path(hvdllm.__file__).resolve().parents[1]

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel that is installed inside another repository is not in a clone of hvdllm.
    if not (root / "conf" / "train.yaml").exists():
        return {"commit": None, "dirty": None}
    status = ask("status", "--porcelain")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def hosts(device: torch.device, world: World) -> list[Json]:
    """The host, device and number of threads of each rank, in rank order. Collective."""
    own = {
        "host": socket.gethostname(),
        "device": devices.name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
    }
    return [json.loads(text) for text in world.texts(json.dumps(own), "start.hosts")]


def slurm() -> dict[str, str]:
    """Slurm's variables of the job that this process runs in. Empty outside Slurm."""
    names = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID")
    return {name: os.environ[name] for name in names if name in os.environ}


def link() -> str | None:
    """The rate of the network lab's links (launch.link) if this run goes over them, else None."""
    return os.environ.get(LINK)


def command() -> list[str]:
    """The command line of this process."""
    return [os.path.basename(sys.argv[0]), *sys.argv[1:]]
