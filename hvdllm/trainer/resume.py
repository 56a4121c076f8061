"""Decides whether a run begins, goes on or is finished.

Rank 0 decides it from the run's folder, before anything is built.

The folder may be a stranger's. `resume=RUN` takes from its config.yaml only the settings that shape numbers
(settings.setting says which they are), and takes no command lines, programs or hosts from its records. Text files are
not taken either. If the same text has been prepared on this machine, it is found by its data hash; otherwise the user
names the files again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdllm import lock, registry, runs, untrusted
from hvdllm.checkpoint import read
from hvdllm.checkpoint.whole import read_state
from hvdllm.config import compose
from hvdllm.config.words import expand, key_of, last, of
from hvdllm.errors import UserError
from hvdllm.paths import path_of
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.text import mix, shards
from hvdllm.text.parts import Mix

# Settings that may differ between the lives of a run. They change where, how fast or how long it computes, not what.
MAY_DIFFER = (
    "name", "runs_dir", "data_dir", "resume", "budget_tokens", "eval_every", "save_every", "sample_every",
    "log_every", "audit_every", "publish_every", "target_loss", "trace_steps", "keep", "world", "device", "launch",
    "track", "debug", "hang_after", "on_hang",
)  # fmt: skip
# The same of settings of groups that otherwise may not.
ANYWHERE = (
    "text.source", "text.address", "text.key", "text.rate", "text.forget", "text.wait_s", "schedule.rewarm_at",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """How a run starts.

    Attributes:
        folder: of the run.
        checkpoint: the one to go on from, or None.
        finished: why there is nothing to do, or None.
        again: whether the folder was there already.
        data_hash: of the text that the run was trained on, or None if it is new.
    """

    folder: str
    checkpoint: str | None = None
    finished: str | None = None
    again: bool = False
    data_hash: str | None = None


def asked(words: Sequence[str], say: Callable[[str], None] = lambda text: None) -> tuple[Config, list[str]]:
    """Composes the configuration of a command line. With `resume=RUN`, the words override the settings of RUN's folder.

    Args:
        words: of the command line.
        say: is told which settings of the folder are not taken from it.

    Returns the configuration, and words from which another process composes the same one.

    Raises UserError if RUN is not the folder of a run, or if it has read files that must be named again.
    """
    given = last(words, "resume", "auto")
    if given in ("auto", "never", "must"):
        return compose.compose(words), list(words)
    typed = next(word.partition("=")[2] for word in reversed(words) if key_of(word) == "resume")
    folder = path_of(typed if os.path.exists(os.path.expanduser(typed)) else given, "resume=")
    if not folder.name or folder.name == "..":
        folder = Path(os.path.abspath(folder))
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"resume={given}: that is not the folder of a run (it needs a config.yaml); give auto, never, must or the "
            "path of a run"
        )
    theirs = runs.read_config(folder)
    own = {"resume": str(folder), "name": folder.name, "runs_dir": str(folder.parent)}
    rest = [each for word in words for each in expand(word) if key_of(each) not in own]
    words = [*rest, *(of(key, value) for key, value in own.items())]
    config, named = compose.compose(words, theirs), set(map(key_of, words))
    _find_text(config, theirs, folder, named)
    if theirs.init_from is not None and "init_from" not in named:
        if not read.steps(folder):
            raise UserError(
                f"{folder} began with weights from elsewhere and has no checkpoint: give init_from={theirs.init_from} "
                "again, files are not taken from a run's folder"
            )
        config.init_from = theirs.init_from  # only for the records, since the run goes on from its checkpoint
    if left := _left_behind(theirs, named):
        say(
            f"{folder}: {', '.join(left)} of this run are not taken from its folder, which may be anybody's: give them "
            "again to have them"
        )
    return config, words


def _find_text(config: Config, theirs: Config, folder: Path, named: set[str]) -> None:
    """Finds the run's text among those prepared on this machine, unless the words name one.

    Raises UserError if the text comes from files and is not prepared here.
    """
    wants = {f"text.{key}": value for key, value in compose.to_dict(theirs)["text"].items() if _is_file(key, value)}
    if config.text.endless:
        if "text.source" not in named:
            raise UserError(
                f"{folder} was trained on a stream. Where it arrives is not taken from a run's folder, which may be "
                f"anybody's: give text.source={theirs.text.source} and what goes with it again"
            )
        return
    if named & {"text.path", "text.sources", "text.validation", "text.tokenizer", "text.prepared"}:
        missing = [key for key in wants if key not in named and config.text.prepared is None]
    else:
        data_hash = next((r.get("data_hash") for r in runs.records(folder) if r.get("kind") == "run"), None)
        data_dir = shards.data_folder(config.data_dir)
        if isinstance(config.text, Mix):
            known = mix.find(data_dir, str(data_hash))
            config.text.sources = known[0] if known else None  # as the user has named them when they were prepared
            found = known is not None
        else:
            found = shards.find(data_dir, str(data_hash)) is not None
        config.text.prepared, missing = (str(data_hash), []) if found else (None, list(wants))
    if missing:
        again = ", ".join(f"{key}={wants[key]}" for key in missing)
        raise UserError(
            f"the text of {folder} is not prepared in {shards.data_folder(config.data_dir)}, and files are not taken "
            f"from a run's folder, which may be anybody's: give {again} again, or data_dir= where it is prepared"
        )


def _is_file(key: str, value: object) -> bool:
    if key == "tokenizer":
        return value not in ("bytes", "bpe")
    return key in ("path", "validation", "sources") and value is not None


def _left_behind(theirs: Config, named: set[str]) -> list[str]:
    """The settings of a folder that are not taken from it and that a user would miss, as words of a command line."""
    words = [] if theirs.data_dir is None else [f"data_dir={theirs.data_dir}"]
    words += [
        f"{group}={name}"
        for group, usual in (("launch", "local"), ("track", "none"))
        if (name := registry.name_of(group, getattr(theirs, group))) != usual
    ]
    return [word for word in words if key_of(word) not in named]


def folder_of(config: Config) -> Path:
    """The folder of a run that has a name."""
    return Path(config.runs_dir).expanduser() / str(config.name)


def decide(config: Config, say: Callable[[str], None]) -> Start:
    """Reads the folder of a run that has a name, and decides how the run starts. Nothing is written.

    Raises UserError if the run cannot start or go on with these settings.
    """
    folder = folder_of(config)
    _refuse_links(folder)
    if not (folder / "config.yaml").exists():
        if config.resume not in ("auto", "never"):
            raise UserError(f"resume={config.resume}: there is no run in {folder} to go on with")
        if folder.exists() and not unused(folder):
            raise UserError(f"{folder} exists and is not the folder of a run: choose another name or runs_dir")
        return Start(str(folder))
    if config.resume == "never":
        raise UserError(f"resume=never, but {folder} holds a run: choose another name, or delete it")
    refuse_differences(runs.read_config(folder, say), config, folder)
    checkpoint = read.newest(folder, say)
    if checkpoint is None and read.steps(folder):
        raise UserError(f"{folder} has checkpoints but none is whole: delete the folder to start anew under this name")
    end, data_hash = None, None
    for record in runs.records(folder, say):
        end = record if record.get("kind") == "end" else end
        if record.get("kind") == "run" and isinstance(record.get("data_hash"), str):
            data_hash = record["data_hash"]
    tokens = read.tokens_of(read_state(checkpoint), checkpoint) if checkpoint else 0
    if end is not None and end.get("reason") == "budget":
        tokens = max(tokens, end["tokens"] if isinstance(end.get("tokens"), int) else 0)
    # A run that was killed or failed after its last checkpoint has no `end` record, or a failed one. Its last record
    # and final/ may be missing, so it goes on to write them.
    if tokens >= config.budget_tokens and end is not None and end.get("reason") != "failed":
        unit = registry.of("task", config.task).facts.unit
        return Start(str(folder), finished=f"{folder} has finished: {tokens:,} {unit} of {config.budget_tokens:,}")
    if checkpoint is None and config.resume != "auto":
        raise UserError(f"resume={config.resume}: {folder} has no checkpoint; resume=auto starts it from the beginning")
    return Start(str(folder), str(checkpoint) if checkpoint else None, again=True, data_hash=data_hash)


def _refuse_links(folder: Path) -> None:
    """Raises UserError if one of the folders in which a run writes and deletes is a link to a place outside the run."""
    for name in ("checkpoints", "final", "published", "log", "tensorboard", "wandb"):
        try:
            if (folder / name).is_symlink():
                untrusted.within(folder / name, folder)
        except (OSError, untrusted.Unfit) as error:
            raise UserError(
                f"{folder / name} {error if isinstance(error, untrusted.Unfit) else 'is a link to nothing'}: a run "
                "writes and deletes there, so put the folder itself there, or make runs_dir the link"
            ) from None


def unused(folder: Path) -> bool:
    """Whether a folder holds only what a launcher may have left, or a run that was killed at its very start."""
    known = re.compile(
        rf"launch\.log|log|log\.txt|checkpoints|\.?{re.escape(runs.FROZEN)}|{lock.NAME}|\.({lock.NAME}|config\.yaml)\.\w+"
    )
    return all(known.fullmatch(file.name) for file in folder.iterdir()) and not read.steps(folder)


def refuse_differences(old: Config, new: Config, folder: Path) -> None:
    """Raises UserError, which names the settings, if some differ that may not."""

    def flat(values: Json) -> Json:
        out: Json = {}
        for key, value in values.items():
            if key not in MAY_DIFFER:
                inner = dict(value) if isinstance(value, dict) else {"": value}
                if key == "text":  # texts are compared by content (the data hash), not by where the files lie
                    inner = {k: v for k, v in inner.items() if k != "prepared" and not _is_file(k, v)}
                out |= {f"{key}.{k}".rstrip("."): v for k, v in inner.items()}
        return out

    # The horizon is stored with the run. If it was left to the budget, that of the first life counts for all of them.
    was, now = flat(compose.to_dict(old)), flat(compose.to_dict(new))
    by_content = ("text.path", "text.validation", "text.tokenizer", "text.sources")
    differ = [
        k for k in {**was, **now}
        if was.get(k) != now.get(k) and k not in ANYWHERE and not (k in by_content and not (k in was and k in now))
    ]  # fmt: skip
    if differ:
        said = ", ".join(f"{key} was {was.get(key)} and is now {now.get(key)}" for key in differ[:3])
        raise UserError(
            f"{folder} cannot go on with other settings ({said}): give it the old ones, or choose another name "
            "(of a sweep: launch.sweep); only the budget, cadences, keep, folders (also of the text), hang_after, "
            "on_hang, world, device, launch, track and debug may differ"
        )
