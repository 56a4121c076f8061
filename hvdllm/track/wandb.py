"""Weights & Biases.

Metrics are plotted over `tokens`. W&B's own step is the number of the record, which grows over all lives of a run, so
that nothing is dropped if a resumed run repeats tokens. Its files stay in the run's folder.

The system statistics are those of the process of rank 0 and of its host. The names of the host and of the user are not
sent.

Offline runs cannot be resumed. Each life is a folder of its own with the same id, and `wandb sync` joins them by time.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from pathlib import Path
from typing import Any

from hvdllm import untrusted
from hvdllm.config import compose
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.track.base import UPLOAD_S, Refused, Say, named
from hvdllm.track.parts import Wandb

ROWS = 100  # of the table of samples; W&B stores the whole table each time it is logged
AXES = ("train", "eval", "audit", "event", "save")


def make(config: Config, folder: Path, kept: Json, before: list[Json], say: Say) -> Tracker:
    kept.setdefault("id", secrets.token_hex(6))
    (folder / "wandb").mkdir(exist_ok=True)
    os.environ |= {name: value for name, value in environment(folder).items() if name not in os.environ}
    return Tracker(config, folder, kept["id"], before, say)


def environment(folder: Path) -> dict[str, str]:
    """Variables that keep W&B's files out of the home folder, and that switch off its own error reports."""
    inside = (folder / "wandb").resolve()
    names = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data"}
    return {**{name: str(inside / part) for name, part in names.items()}, "WANDB_ERROR_REPORTING": "false"}


class Tracker:
    """A run of W&B, which is online if its server answers."""

    def __init__(self, config: Config, folder: Path, name: str, before: list[Json], say: Say) -> None:
        self.settings: Wandb = config.track
        self.id, self.folder, self.say = name, folder.resolve(), say
        self.rows = [[r["tokens"], r["text"]] for r in before if r.get("kind") == "sample"]
        self.run = self._start(config)
        self.run.define_metric("tokens")
        for prefix in AXES:
            self.run.define_metric(f"{prefix}/*", step_metric="tokens")

    def record(self, number: int, record: Json) -> None:
        import wandb

        values = dict(named(record))
        if record["kind"] == "run":
            about = {key: value for key, value in record.items() if key not in ("kind", "config")}
            self.run.config.update({"run": about}, allow_val_change=True)
            return
        if record["kind"] == "end":
            self.run.summary.update({"end/tokens": record.get("tokens"), **values})
            return
        if record["kind"] == "sample":
            self.rows = [*self.rows, [record["tokens"], record["text"]]][-ROWS:]
            values = {"samples": wandb.Table(columns=["tokens", "text"], data=self.rows)}
        self.run.log({"tokens": record.get("tokens", 0), **values}, step=number)
        if record["kind"] == "save" and self.settings.checkpoints:
            artifact = wandb.Artifact(f"checkpoint-{self.id}", "model", metadata={"tokens": record["tokens"]})
            path = self.folder / "checkpoints" / str(int(record["step"]))  # a record must not choose a path
            try:
                artifact.add_dir(str(untrusted.within(path, self.folder)))
            except (OSError, ValueError):
                if path.is_dir():
                    raise
                self.say(f"{path} was deleted before W&B had it: a larger keep gives it time")
            else:
                self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        sends = f"`hvdllm track sync {shlex.quote(str(self.folder))}` sends it to the server"
        try:
            self.run.finish(exit_code=int(failed))
        except TimeoutError:
            self.say(f"W&B's server did not take all of this run within {UPLOAD_S:.0f} s: {sends}")
        if self.run.offline:
            self.say(f"W&B has an offline run: {sends}")

    def _start(self, config: Config) -> Any:
        """Starts W&B online or, if that is allowed, offline with a sentence. Raises Refused if it is not."""
        import wandb

        wanted = self.settings.mode
        if wanted == "auto" and (said := os.environ.get("WANDB_MODE", "online")) not in ("online", "run"):
            self.say(f"W&B stays offline: the environment has WANDB_MODE={said}")
            wanted = "offline"
        if wanted != "offline":
            old = self._online()
            try:
                run = self._init(config, "online")
                self.say(f"W&B: {run.url}")
                return run
            except (wandb.Error, TimeoutError) as error:
                why = "it has no key (`wandb login` stores one)"
                if not isinstance(error, wandb.errors.UsageError):
                    cause = " ".join(str(error).split()).rpartition(": ")[2]  # Go's errors end with the innermost
                    why = f"{wandb.setup().settings.base_url} gave no run within {self.settings.start_s:g} s ({cause})"
                wandb.teardown()  # else its service would say that the id is in use
                for left in self._online() - old:  # it is empty, but `wandb sync` would send it
                    shutil.rmtree(left, ignore_errors=True)
                if wanted == "online":
                    raise Refused(f"track.mode=online, but W&B cannot start: {why}; or give track.mode=auto") from None
                self.say(f"W&B stays offline: {why}")
        return self._init(config, "offline")

    def _online(self) -> set[Path]:
        return set((self.folder / "wandb").glob(f"run-*-{self.id}"))

    def _init(self, config: Config, mode: str) -> Any:
        import wandb

        tags = self.settings.tags
        return wandb.init(
            project=self.settings.project, entity=self.settings.entity, name=self.folder.name, id=self.id,
            group=self.settings.group or config.launch.sweep, tags=[tags] if isinstance(tags, str) else tags,
            config=compose.to_dict(config), allow_val_change=True, mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True, quiet=True, console="off", disable_git=True, disable_code=True, save_code=False,
                init_timeout=self.settings.start_s, finish_timeout=UPLOAD_S,
                finish_timeout_raises=True, root_dir=str(self.folder),
                x_disable_meta=True, x_save_requirements=False, x_stats_pid=os.getppid(),
            ),
        )  # fmt: skip
