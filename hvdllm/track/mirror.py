"""The run's side of a tracker: starts its process, passes on what it says, and ends it.

The run never waits for it while it trains.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path

from hvdllm import registry, untrusted
from hvdllm.interpreter import PYTHON, found
from hvdllm.plain import Json
from hvdllm.settings import Config, several
from hvdllm.track.base import END_S, Say

STOP_S = 2.0  # seconds that a stopped or failed run gives its tracker, because launchers kill soon
SLACK_S = 20.0  # seconds for the start of the process, and for wandb.init beyond its timeout
PROCESS = (*PYTHON, "hvdllm.track.process")


def start(config: Config, folder: Path, say: Say) -> Mirror | None:
    """Starts the tracker that the settings name; None if they name none. On rank 0 only.

    `folder` is that of the run, which has written its first record.
    """
    if registry.of("track", config.track).made is None:
        return None
    return Mirror([*PROCESS, str(folder), *several(config.plugins)], folder, say, {**os.environ, **found()})


class Mirror:
    """The process of a tracker, and a thread that waits for its sentences."""

    def __init__(self, command: list[str], folder: Path, say: Say, env: dict[str, str] | None = None) -> None:
        self._say, self._folder, self._closed = say, folder, False
        self._said = False  # whether a person was told that something is wrong
        self._started: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        try:
            with untrusted.appended(folder / "track.log") as log:
                # It has a session of its own, because Ctrl-C and the signals of a launcher are meant for the run.
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True, env=env
                )
        except (OSError, untrusted.Unfit) as error:
            self._process = None
            self._lost(str(error))
            return
        self._thread = threading.Thread(target=self._listen, name="tracker", daemon=True)
        self._thread.start()

    def refusal(self, limit_s: float) -> str | None:
        """Waits until the tracker has started. Returns None, or one sentence that says why it has not."""
        try:
            return self._started.get(timeout=limit_s)
        except queue.Empty:
            return f"the tracker has not started within {limit_s:.0f} s: {self._folder}/track.log may say why"

    def close(self, patient: bool) -> None:
        """Ends the tracker after the run's last record.

        If `patient`, it waits until everything was sent, but for no longer than END_S.
        """
        if self._process is None:
            return
        self._closed = True
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S + 1 if patient else STOP_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if patient:
                self._say(f"the tracker was ended before all was sent: {self._folder} has all records")
        else:
            self._thread.join(STOP_S)
            ended = self._process.returncode  # code 1 also means that the run has failed
            if ended and (patient or ended != 1) and not self._said:
                self._say(f"the tracker failed ({self._folder}/track.log may say why); the folder has all records")
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        refused = False
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, AttributeError):
                message: Json = json.loads(line)
                if "say" in message:
                    self._said = True
                    self._say(str(message["say"]))
                if "started" in message:
                    refused = message["started"] is not None
                    self._started.put(message["started"])
        if not self._closed and not refused:
            self._lost(f"{self._folder}/track.log may say why")

    def _lost(self, why: str) -> None:
        self._started.put(f"the tracker has ended: {why}")
        self._said = True
        self._say(f"the tracker has ended ({why}); the run goes on, and its folder has all records")
