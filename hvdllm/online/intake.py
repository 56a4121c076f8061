"""The run's side of a reader: a rank starts it, passes on what it says, and starts it again if it dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hvdllm import untrusted
from hvdllm.errors import RunError
from hvdllm.interpreter import PYTHON, found
from hvdllm.online import reader
from hvdllm.plain import Json
from hvdllm.text.parts import Stream

LOG = "reader.log"  # what the reader's libraries print, beside the log
AGAIN_S = (0.1, 1.0, 5.0, 30.0)  # seconds before it is started again
END_S = 5.0  # seconds that it has to end
TOLD = 5  # documents set aside that the user is told of; the file has all


class Intake:
    """The reader of a stream, and a thread that listens to it.

    Args:
        settings: of the stream.
        folder: of the log.
        tokenizer: the path of its tokenizer.json.
        say: gets what a person should know.
        number, of: which of how many readers of the same source it is.
    """

    def __init__(
        self, settings: Stream, folder: Path, tokenizer: Path, say: Callable[[str], None], number: int = 0, of: int = 1
    ) -> None:
        self.folder, self.say = folder, say
        self._first = reader.task(settings, folder, tokenizer, number, of)
        self._stdin = settings.source == "stdin"
        self._problem: str | None = None
        self._closed = threading.Event()
        self._write = -1
        self._lock = threading.Lock()
        self._told = 0
        self._process = self._start()
        self._thread = threading.Thread(target=self._listen, name="reader", daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        read, write = os.pipe()
        with untrusted.appended(self.folder / LOG) as log:
            # It has a session of its own, because Ctrl-C and the signals of a launcher are meant for the run.
            process = subprocess.Popen(
                [*PYTHON, "hvdllm.online.reader", str(read)], stdin=None if self._stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, pass_fds=(read,), start_new_session=True,
                env={**os.environ, **found()},
            )  # fmt: skip
        os.close(read)
        with self._lock:
            self._write = write
        self._send(self._first)
        return process

    def _send(self, line: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._write >= 0:
                os.write(self._write, line)

    def _listen(self) -> None:
        deaths = 0
        while True:
            assert self._process.stdout is not None
            begun = time.monotonic()
            for line in self._process.stdout:
                self._hear(line)
            code = self._process.wait()
            self._process.stdout.close()
            if self._closed.is_set() or self._problem is not None:
                return
            deaths = 0 if time.monotonic() - begun > 60 else deaths + 1
            how = f"signal {-code}" if code < 0 else f"code {code}, see {self.folder / LOG}"
            self.say(f"the process that reads the stream has ended ({how}): it is started again")
            if self._closed.wait(AGAIN_S[min(deaths, len(AGAIN_S) - 1)]):
                return
            self._hang_up()
            try:
                self._process = self._start()
            except (OSError, untrusted.Unfit) as error:
                self._problem = f"the process that reads the stream cannot be started ({error})"
                return

    def _hear(self, line: bytes) -> None:
        try:
            (kind, what), *_ = untrusted.parsed(line).items()
        except (ValueError, AttributeError):
            return
        if kind == "error":
            self._problem = str(what)
        elif kind == "aside":
            self._told += 1
            if self._told <= TOLD:
                self.say(str(what) + (", and what else will be" if self._told == TOLD else ""))
        else:
            self.say(str(what))

    def check(self) -> None:
        """Raises RunError if the stream cannot be read at all."""
        if self._problem is not None:
            raise RunError(self._problem)

    def forget(self, at: Json) -> None:
        """Tells the reader that the source may forget what it has read up to this place."""
        self._send(json.dumps(at).encode() + b"\n")

    def _hang_up(self) -> None:
        with self._lock:
            if self._write >= 0:
                os.close(self._write)
            self._write = -1

    def close(self) -> None:
        """Ends the reader, which first brings to the disk what it has appended."""
        self._closed.set()
        self._hang_up()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._thread.join(END_S)
