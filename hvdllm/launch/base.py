"""The point of a sweep, and the protocol of a launcher, which local.py, horovodrun.py, slurm.py and ray.py implement.

A launcher starts `command(point)` as a run of its own, in the environment that a shell would give it. It sends all that
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

# Variables in the environment of ranks: the user's terminal, and the file to which the ranks of a Slurm job write the
# tokens at which they stopped.
TERMINAL = "HVDLLM_TERMINAL"
STOP_FILE = "HVDLLM_STOP_FILE"

Say = Callable[[str], None]  # takes one sentence for the user


@dataclass(frozen=True)
class Point:
    """A point of a sweep, which is one run.

    Attributes:
        name: of the run's folder under runs_dir.
        runs_dir: where the folder lies.
        words: all settings of the run as words of a command line. `runs_dir=`, `name=` and `launch.sweep=` are among
          them; other settings of the group launch are not, since ranks run with launch=local.
    """

    name: str
    runs_dir: str
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.runs_dir) / self.name


class Launcher(Protocol):
    """A launcher. It is a module, and `settings` are of the class that it is registered with."""

    def ready(self, settings: Chosen) -> None:
        """Raises UserError if nothing can be started with these settings on this machine."""

    def room(self, settings: Chosen) -> int | None:
        """How many runs may be started at once, if the user does not say it; None: any number, they wait elsewhere."""

    def launch(self, point: Point, settings: Chosen, stop: threading.Event, say: Say) -> int:
        """Starts the point and waits for its end.

        Args:
            point: to be started.
            settings: of the launcher.
            stop: set when the sweep gets Ctrl-C or SIGTERM. The point's ranks are then asked to save and end, and the
              call returns soon. Under Slurm the job stays queued or goes on, since it outlives this process.
            say: takes sentences for the user.

        Returns the exit code of the run.

        Raises UserError if nothing could be started. No rank has run then.
        """


def command(point: Point) -> list[str]:
    """The command line of a rank of this point."""
    return [*PYTHON, "hvdllm", "train", *point.words]
