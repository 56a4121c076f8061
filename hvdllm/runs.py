"""A run's folder: where it is, what stands in it, and how it is written so that a kill at any moment leaves it whole.

runs/<name>/
  config.yaml         the resolved configuration, its sum and that of tokenizer.json in its last lines
  metrics.jsonl       one JSON object a line, `kind` first: run, commit, eval, audit, sample, save, event, end; last
                      its `sum`, by which a changed or lost line shows (sums.py)
  checkpoints/<step>/ to go on from (checkpoint/write.py)
  final/              the weights to keep, once the budget is met, and their sum
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

from hvdllm import screen, sums, untrusted
from hvdllm.config import compose
from hvdllm.errors import RunError, UserError
from hvdllm.lock import Lock
from hvdllm.plain import Json
from hvdllm.settings import Config

MOST_CONFIG = 256 * 2**10  # bytes of a config.yaml
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
    """The file has either its old content or the new one, whatever happens. A link is replaced, not written through."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    with open(beside, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def records(folder: Path, say: Say | None = None) -> Iterator[Json]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out. say: hears, at its end, of lines
    that were changed or lost."""
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
    """The configuration of an existing run, its types, choices and bounds checked as those of the command line. Raises
    UserError where there is none, where it was changed, or is one of another version. say: hears that it has no sum."""
    return compose.from_dict(_config_text(folder, say)[0], f"{folder}/config.yaml")


def tokenizer_sum(folder: Path) -> str | None:
    """The sha256 that the tokenizer.json of a run has; None: it was written before there were sums."""
    return _config_text(folder, None)[1].get("tokenizer.json")


def _config_text(folder: Path, say: Say | None) -> tuple[Json, dict[str, str]]:
    """The settings of config.yaml, unchecked, and the sums that it has of other files."""
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
        self._sum = ""  # of the last line

    def check(self) -> None:
        """Raises RunError where the folder was removed, moved or taken over while the run trained."""
        if self.lock is not None and not self.lock.intact():
            raise RunError(no_longer_ours(self.path))

    def create(self, config: Config, others: dict[str, str] | None = None) -> None:
        """Makes the folder and its config.yaml. others: sums of other files that it keeps, by their names."""
        self.check()
        with self._guard():
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", sums.signed(compose.to_yaml(config), others or {}))

    def cut(self, tokens: int | None) -> list[str]:
        """Takes back what was recorded after a checkpoint at `tokens`; None: all but runs and events. Returns what was
        wrong with the lines, which nobody will see in the new ones.

        The commit record at the checkpoint itself goes too: it was pending there and is written again.
        """
        kept, problems, last = [], list[str](), ""
        for record in records(self.path, problems.append):
            at = record.get("tokens", 0)
            if record.get("kind") in ("run", "event"):
                keep = True
            elif tokens is None or record.get("kind") in ("commit", "end"):
                keep = tokens is not None and record.get("kind") == "commit" and at < tokens
            else:
                keep = at <= tokens
            if keep:
                line, last = sums.sealed(json.dumps(record), last)
                kept.append(line)
        with self._guard():
            write_whole(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))
        return problems

    def record(self, kind: str, values: Json, *, sync: bool = False) -> None:
        """Appends a record. sync: it must survive a power cut."""
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
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # a record that did not fit is in its buffer still; record() said so
                self._metrics.close()
            self._metrics = None

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """An OSError inside becomes the one sentence that a user needs."""
        try:
            yield
        except untrusted.Unfit as error:
            raise RunError(f"cannot write to {self.path}: one of its files {error}; choose another name") from None
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path} ({error.strerror or error}): free some space or choose another runs_dir, "
                "then start again with the same name; the last whole checkpoint is kept"
            ) from None
