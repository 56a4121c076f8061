"""Does this run begin, go on, or is it done? Decided by rank 0 from the run's folder, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdllm import lock, runs
from hvdllm.checkpoint import read
from hvdllm.config import compose
from hvdllm.config.paths import path_of
from hvdllm.config.schema import Config
from hvdllm.config.words import last, of
from hvdllm.errors import UserError

# What may differ between the lives of a run: it changes where and how fast, or for how long, but not what is computed.
MAY_DIFFER = (
    "name", "runs_dir", "data_dir", "resume", "budget_tokens", "eval_every", "save_every", "sample_every",
    "log_every", "audit_every", "trace_steps", "keep", "world", "device", "launch", "track",
    "text.path", "text.validation",  # where the text lies: whether it is the same its hash says
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """folder: of the run. checkpoint: to go on from, or None. finished: why there is nothing to do, or None."""

    folder: str
    checkpoint: str | None = None
    finished: str | None = None
    again: bool = False  # the folder was there already


def with_run(words: list[str]) -> list[str]:
    """The overrides to compose: those of `resume=RUN`'s run first, then those given now.

    Raises UserError where RUN is no folder of a run.
    """
    given = last(words, "resume", "auto")
    if given in ("auto", "never", "must"):
        return words
    folder = path_of(given, "resume=")
    first = next((r for r in runs.records(folder) if r.get("kind") == "run"), None)
    if first is None:
        raise UserError(
            f"resume={given}: that is not the folder of a run (it needs a metrics.jsonl that says how the run was "
            "started); give auto, never, must or the path of a run"
        )
    where = [of("name", folder.name), of("runs_dir", str(folder.parent))]
    return compose.merged(first.get("overrides", []), [*words, *where])


def folder_of(config: Config) -> Path:
    """The folder of a run that has a name."""
    return Path(config.runs_dir).expanduser() / str(config.name)


def decide(config: Config, say: Callable[[str], None]) -> Start:
    """Reads the folder of a run that has a name; makes none. Raises UserError where the settings do not allow to go
    on."""
    folder = folder_of(config)
    if not (folder / "config.yaml").exists():
        if config.resume not in ("auto", "never"):
            raise UserError(f"resume={config.resume}: there is no run in {folder} to go on with")
        if folder.exists() and not unused(folder):
            raise UserError(f"{folder} exists and is not the folder of a run: choose another name or runs_dir")
        return Start(str(folder))
    if config.resume == "never":
        raise UserError(f"resume=never, but {folder} holds a run: choose another name, or delete it")
    refuse_differences(runs.read_config(folder), config, folder)
    checkpoint = read.newest(folder, say)
    if checkpoint is None and read.steps(folder):
        raise UserError(f"{folder} has checkpoints but none is whole: delete the folder to start anew under this name")
    end = next((r for r in reversed(list(runs.records(folder))) if r.get("kind") == "end"), None)
    tokens = read.read_state(checkpoint)["shared"]["tokens"] if checkpoint else 0
    if end is not None and end.get("reason") == "budget":
        tokens = max(tokens, int(end.get("tokens", 0)))
    # Killed, or failed, behind its last checkpoint it has no end or a failed one: its last record and final/ may be
    # missing, and it goes on to write them.
    if tokens >= config.budget_tokens and end is not None and end.get("reason") != "failed":
        return Start(str(folder), finished=f"{folder} has finished: {tokens:,} tokens of {config.budget_tokens:,}")
    if checkpoint is None and config.resume != "auto":
        raise UserError(f"resume={config.resume}: {folder} has no checkpoint; resume=auto starts it from the beginning")
    return Start(str(folder), str(checkpoint) if checkpoint else None, again=True)


def unused(folder: Path) -> bool:
    """Does it hold nothing but what a launcher, or a run that was killed at its very start, may have left?"""
    known = re.compile(rf"launch\.log|log\.txt|checkpoints|{lock.NAME}|\.({lock.NAME}|config\.yaml)\.\w+")
    return all(known.fullmatch(file.name) for file in folder.iterdir()) and not read.steps(folder)


def refuse_differences(old: Config, new: Config, folder: Path) -> None:
    """Raises UserError naming the settings that differ and may not."""

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            if key not in MAY_DIFFER:
                inner = value if isinstance(value, dict) else {"": value}
                each = {f"{key}.{k}".rstrip("."): v for k, v in inner.items()}
                out |= {k: v for k, v in each.items() if k not in MAY_DIFFER}
        return out

    # The horizon is stored with the run: where it was left to the budget, the first budget counts for ever.
    was, now = flat(compose.to_dict(old)), flat(compose.to_dict(new))
    differ = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if differ:
        said = ", ".join(f"{key} was {was.get(key)} and is now {now.get(key)}" for key in differ[:3])
        raise UserError(
            f"{folder} cannot go on with other settings ({said}): give it the old ones, or choose another name "
            "(of a sweep: launch.sweep); only the budget, cadences, keep, folders (also of the text), world, device, "
            "launch and track may differ"
        )
