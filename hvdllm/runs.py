"""The folder of a run: what it holds, and how it is written so that it stays whole if the run is killed at any moment.

runs/<name>/
  config.yaml         the resolved configuration; the last lines are sums of tokenizer.json and of the file itself
  metrics.jsonl       one JSON object for each record; the first key is `kind` (run, commit, eval, audit, sample, save,
                      publish, event or end), and the last is `sum`, by which changed and lost lines are noticed
                      (sums.py)
  checkpoints/<step>/ the checkpoints to go on from (checkpoint/write.py)
  final/              the weights to keep, once the budget is met, and their sum
  published/TOKENS/   with publish_every, the newest weights to serve; the link published/latest leads there
  log/                with text=stream, the tokens that have arrived (online/log.py)
  tokenizer.json      the tokenizer, so that a copied run can be sampled
  frozen.safetensors  with model.lora_rank, the weights that are not trained
  chat.json           with text=chat, what its template puts around a question
  samples.txt         the samples of text
  log.txt             what was printed
  stacks-rank-N.txt   where the threads of rank N were when a rank stood still, or when it crashed
  beats-*/            heartbeats of the ranks, as long as the run lives (trainer/channel.py)
  lock                says which process trains in the folder, as long as it does (lock.py)
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvdllm import screen, sums, untrusted
from hvdllm.config import compose
from hvdllm.errors import RunError, UserError
from hvdllm.lock import Lock
from hvdllm.plain import Json
from hvdllm.settings import Config

ASKED = "chat.json"  # what stands around a question, of a run that learns conversations (text/chat.py)
FROZEN = "frozen.safetensors"  # the weights of a run that are not trained, written once (trainer/frozen.py)
MOST_CONFIG = 256 * 2**10  # the most bytes of a config.yaml
Say = Callable[[str], None]  # takes one sentence for the user


def new_name() -> str:
    """A name for a new run, made of the date, the time and four hex digits."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def sync_folder(path: Path) -> None:
    """Syncs a folder to the disk, so that new and renamed files in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a file so that it always has either its old content or the new one. A link is replaced, not followed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    with open(beside, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def records(folder: Path, say: Say | None = None) -> Iterator[Json]:
    """Yields the records of metrics.jsonl. A last line that a kill has cut short is left out.

    Args:
        folder: of the run.
        say: is told, at the end, of lines that were changed or lost.
    """
    log = sums.Log()
    try:
        with untrusted.opened(folder / "metrics.jsonl", folder) as file:
            for line in untrusted.lines(file):
                if (record := log.record(line)) is not None:
                    yield record
        problem = log.problem()
    except FileNotFoundError:
        return
    except (OSError, untrusted.Unfit) as error:
        problem = str(error)
    if problem and say is not None:
        say(f"{folder}/metrics.jsonl {problem}")


def read_config(folder: Path, say: Say | None = None) -> Config:
    """The configuration of an existing run. Types, choices and bounds are checked as on the command line.

    Args:
        folder: of the run.
        say: is told if the file has no sum.

    Raises UserError if there is no configuration, if it was changed, or if it does not fit this version.
    """
    return compose.from_dict(_config_text(folder, say)[0], f"{folder}/config.yaml")


def file_sum(folder: Path, name: str) -> str | None:
    """The sha256 that a file of a run must have, or None if the run was written before there were sums."""
    return _config_text(folder, None)[1].get(name)


def _config_text(folder: Path, say: Say | None) -> tuple[Json, dict[str, str]]:
    """The settings in config.yaml, unchecked, and its sums of other files."""
    path = folder / "config.yaml"
    try:
        text = untrusted.read(path, MOST_CONFIG, folder)
        found = sums.verified(text)
        values = untrusted.parsed_yaml(text)
    except FileNotFoundError:
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): make it readable") from None
    except untrusted.Unfit as error:
        raise UserError(f"{path} {error}: copy the run's folder again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: it was cut short or is another program's")
    if found is None and say is not None:
        say(f"{path} has no sum, it is of an older version: damage to it or to tokenizer.json would go unseen")
    return values, found or {}


def no_longer_ours(folder: Path) -> str:
    """The sentence of a run that has lost its folder."""
    return (
        f"{folder} was removed, moved or taken over by another process while this run trained in it, so the run ends: "
        "start it again, which goes on from the last checkpoint where there is one"
    )


class Folder:
    """Writes the files of a run, on rank 0 only.

    Each method raises RunError if the disk refuses, or if the folder is no longer the one that was locked.

    Args:
        path: of the folder.
        lock: of the folder, if there is one.
    """

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path, self.lock = path, lock
        self._metrics: Any = None
        self._sum = ""  # the sum of the last line

    def check(self) -> None:
        """Raises RunError if the folder was removed, moved or taken over while the run trained."""
        if self.lock is not None and not self.lock.intact():
            raise RunError(no_longer_ours(self.path))

    def create(self, config: Config, others: dict[str, str] | None = None) -> None:
        """Makes the folder and its config.yaml. others: sums of other files by their names, which it also holds."""
        self.check()
        with self._guard():
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", sums.signed(compose.to_yaml(config), others or {}))

    def truncate(self, tokens: int | None, pending: bool = True) -> list[str]:
        """Deletes the records that were written after a checkpoint.

        A commit record at the checkpoint itself that was pending there is deleted, too, since it is written again.
        Records of runs and events are always kept.

        Args:
            tokens: of the checkpoint, or None if there is none.
            pending: whether a commit record was pending there.

        Returns what was wrong with the old lines, since the new ones do not show it.
        """
        kept, problems, last = [], list[str](), ""
        for record in records(self.path, problems.append):
            at = record.get("tokens", 0)
            if record.get("kind") in ("run", "event"):
                keep = True
            elif tokens is None or record.get("kind") in ("commit", "end"):
                keep = tokens is not None and record.get("kind") == "commit" and at < tokens + (not pending)
            else:
                keep = at <= tokens
            if keep:
                line, last = sums.sealed(json.dumps(record), last)
                kept.append(line)
        with self._guard():
            write_whole(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))
        return problems

    def record(self, kind: str, values: Json, *, sync: bool = False) -> None:
        """Appends a record. sync: whether it must survive a power cut."""
        self.check()
        with self._guard():
            if self._metrics is None:
                self._sum = sums.last(self.path / "metrics.jsonl")
                self._metrics = untrusted.appended(self.path / "metrics.jsonl")
            line, self._sum = sums.sealed(json.dumps({"kind": kind, **values}), self._sum)
            self._metrics.write(line + "\n")
            self._metrics.flush()
            if sync:
                os.fsync(self._metrics.fileno())

    def append(self, name: str, text: str) -> None:
        """Adds text to samples.txt or log.txt."""
        self.check()
        with self._guard(), untrusted.appended(self.path / name) as file:
            file.write(screen.clean(text))

    def close(self) -> None:
        """Closes metrics.jsonl."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # the buffer may still hold a record that did not fit
                self._metrics.close()
            self._metrics = None

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """A context in which an OSError becomes the sentence that a user needs."""
        try:
            yield
        except untrusted.Unfit as error:
            raise RunError(f"cannot write to {self.path}: one of its files {error}; choose another name") from None
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path} ({error.strerror or error}): free some space or choose another runs_dir, "
                "then start again with the same name; the last whole checkpoint is kept"
            ) from None
