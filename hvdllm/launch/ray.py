"""Starts a point on the nodes of a Ray cluster. This process does not import Ray: a driver for each run does.

The driver (ray_driver.py) is to this process what horovodrun is to horovodrun.py: it starts the ranks, and when it is
asked to stop, they save and end. What Ray prints stays in launch.log, and if Ray's own code ends the process that uses
it, as when the head of the cluster is gone, a sweep goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import threading

from hvdllm.errors import UserError
from hvdllm.interpreter import PYTHON, found
from hvdllm.launch import local
from hvdllm.launch.base import Point, Say, command
from hvdllm.launch.parts import Ray

ENV = {"PYTHONUNBUFFERED": "1", "RAY_ENABLE_AUTO_CONNECT": "0"}  # else Ray starts a cluster where it has lost its own
ASK_S = 60.0  # the longest that a cluster may take to answer


def ready(settings: Ray) -> None:
    """Raises UserError if Ray is not installed, if the cluster does not answer, or if a run has no room in it."""
    if (spec := importlib.util.find_spec("ray")) is None or spec.origin is None:
        raise UserError("launch=ray: Ray is not installed: pip install hvdllm[ray]")
    room(settings)


def room(settings: Ray) -> int:
    """How many runs find room in the cluster at once, by all that its nodes have. Raises UserError as ready() does."""
    return _room(driver(settings))


def launch(point: Point, settings: Ray, stop: threading.Event, say: Say) -> int:
    """Runs the point on the cluster, as base.Launcher says."""
    words = [*driver(settings), point.runs_dir, point.name, *command(point)]
    env = {**os.environ, **ENV}
    return local.run(words, env, point.folder / "launch.log", stop, lambda pid, mark: local.ask([pid]))


def driver(settings: Ray) -> tuple[str, ...]:
    """The command line of the driver, to which a run may be added."""
    own = {"sweep": None, "parallel": None}  # of this process
    return (*PYTHON, "hvdllm.launch.ray_driver", json.dumps({**dataclasses.asdict(settings), **own}))


@functools.cache  # the points of a sweep ask the same
def _room(words: tuple[str, ...]) -> int:
    try:
        done = subprocess.run(
            words, env={**os.environ, **found(), **ENV}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=ASK_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"launch=ray: the cluster does not answer within {ASK_S:.0f} s: is its head alive?") from None
    last = "".join(done.stdout.strip().splitlines()[-1:])
    if done.returncode:
        raise UserError(
            last.removeprefix("hvdllm: ") or f"launch=ray: Ray ended with code {done.returncode} as it was asked"
        )
    return int(last)
