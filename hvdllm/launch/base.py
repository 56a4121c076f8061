"""A point of a sweep, and what a launcher is: local.py, horovodrun.py and slurm.py are three.

A launcher starts `command(point)` as a run of its own, in the environment that a shell would give it, sends all that
the run prints to `launch.log` in the point's folder, and returns its exit code. It imports neither torch nor Horovod.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hvdllm.interpreter import PYTHON
from hvdllm.settings import Chosen

TERMINAL = "HVDLLM_TERMINAL"  # in the environment of ranks that are started here: where a person looks on
STOP_FILE = "HVDLLM_STOP_FILE"  # in the environment of a Slurm job's ranks: where to leave the tokens of a stop

Say = Callable[[str], None]  # takes one sentence for a person


@dataclass(frozen=True)
class Point:
    """name: of the run's folder under runs_dir. words: all settings of the run, `runs_dir=`, `name=` and
    `launch.sweep=` included, those of the group launch left out (a rank is launch=local)."""

    name: str
    runs_dir: str
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name


class Launcher(Protocol):
    """A module. settings: those that it is registered with."""

    def ready(self, settings: Chosen) -> None:
        """Raises UserError where these settings cannot start anything on this machine."""

    def launch(self, point: Point, settings: Chosen, stop: threading.Event, say: Say) -> int:
        """Starts the point and waits for its end. Raises UserError where nothing could be started (and why, in a
        sentence, before any rank ran).

        stop: set by Ctrl-C or SIGTERM of the sweep; then the point's ranks are asked to save and to end (under Slurm
            they stay queued or running: the job outlives this process), and it returns soon.
        """


def command(point: Point) -> list[str]:
    """What a rank of this point is."""
    return [*PYTHON, "hvdllm", "train", *point.words]
