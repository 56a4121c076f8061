"""A run's folder: where it is, what stands in it, and how it is written so that a kill at any moment leaves it whole.

runs/<name>/
  config.yaml         the resolved configuration
  metrics.jsonl       one JSON object a line, `kind` first: run, commit, eval, audit, sample, save, event, end
  checkpoints/<step>/ to go on from (checkpoint/write.py)
  final/              the weights to keep, once the budget is met
  tokenizer.json      so that a copied run can be sampled
  samples.txt, log.txt
  lock                who trains in it (lock.py), as long as it does
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

from hvdllm.config import compose
from hvdllm.config.schema import Config
from hvdllm.errors import RunError, UserError
from hvdllm.lock import Lock

Say = Callable[[str], None]  # takes one sentence for a person


def new_name() -> str:
    """Date, time and four hex digits."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def sync_folder(path: Path) -> None:
    """Makes names in a folder (a rename, a new file) survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: str | bytes) -> None:
    """The file has either its old content or the new one, whatever happens."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def read_config(folder: Path) -> Config:
    """The configuration of an existing run. Raises UserError where there is none, or one of another version."""
    import yaml

    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except OSError:
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml") from None
    except yaml.YAMLError as error:
        raise UserError(f"{folder}/config.yaml is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder}/config.yaml holds no settings: it was cut short or is another program's")
    return compose.from_dict(values)


def no_longer_ours(folder: Path) -> str:
    return (
        f"{folder} was removed, moved or taken over by another process while this run trained in it, so the run ends: "
        "start it again, which goes on from the last checkpoint where there is one"
    )


class Folder:
    """Writes a run's files; on rank 0 only. Each method raises RunError where the disk does not take it, or where the
    folder is no longer the one that `lock` was taken in."""

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path, self.lock = path, lock
        self._metrics: Any = None

    def check(self) -> None:
        """Raises RunError where the folder was removed, moved or taken over while the run trained."""
        if self.lock is not None and not self.lock.intact():
            raise RunError(no_longer_ours(self.path))

    def create(self, config: Config) -> None:
        """Makes the folder and its config.yaml."""
        self.check()
        with self._guard():
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", compose.to_yaml(config))

    def cut(self, tokens: int | None) -> None:
        """Takes back what was recorded after a checkpoint at `tokens`; None: all but runs and events.

        The commit record at the checkpoint itself goes too: it was pending there and is written again.
        """
        kept = []
        for record in records(self.path):
            at = record.get("tokens", 0)
            if record.get("kind") in ("run", "event"):
                keep = True
            elif tokens is None or record.get("kind") in ("commit", "end"):
                keep = tokens is not None and record.get("kind") == "commit" and at < tokens
            else:
                keep = at <= tokens
            if keep:
                kept.append(json.dumps(record))
        with self._guard():
            write_whole(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))

    def record(self, kind: str, values: dict[str, Any], *, sync: bool = False) -> None:
        """Appends a record. sync: it must survive a power cut."""
        self.check()
        with self._guard():
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115 - open as long as the run
            self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
            self._metrics.flush()
            if sync:
                os.fsync(self._metrics.fileno())

    def append(self, name: str, text: str) -> None:
        """Adds text to samples.txt or log.txt."""
        self.check()
        with self._guard(), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)

    def close(self) -> None:
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # a record that did not fit is in its buffer still; record() said so
                self._metrics.close()
            self._metrics = None

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """An OSError inside becomes the one sentence that a user needs."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path} ({error.strerror or error}): free some space or choose another runs_dir, "
                "then start again with the same name; the last whole checkpoint is kept"
            ) from None
