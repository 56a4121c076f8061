"""Who else gets a run's records: the settings of each tracker."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvdllm.paths import short
from hvdllm.registry import TrackerFacts, part
from hvdllm.settings import Settings, Setup, Several, setting

LONGEST = 128  # letters of a name, to W&B


@part("track", "none", None, TrackerFacts())
@dataclass
class NoTracker(Settings):
    """The run's folder has all records; nothing else gets them."""


@part("track", "wandb", "hvdllm.track.wandb:make", TrackerFacts("wandb"))
@dataclass
class Wandb(Settings):
    """Weights & Biases: all records by tokens, configuration, samples; offline where no server is reached."""

    project: str = setting("hvdllm", "project of the run")
    entity: str | None = setting(None, "user or team; null: the key's own")
    group: str | None = setting(None, "group of the run; null: its sweep")
    tags: Several = setting(None, "a tag or a list of tags; null: none")
    mode: str = setting(
        "auto",
        "auto (online where a server and a key are there within start_s, else offline with a sentence), online "
        "(refused without them) or offline",
        choices=("auto", "online", "offline"),
    )
    start_s: float = setting(
        15.0, "seconds that a server may take at the start before the run goes offline", least=1, most=1e6
    )
    checkpoints: bool = setting(False, "upload each checkpoint as an artifact")

    def refusal(self, setup: Setup) -> str | None:
        tags = self.tags
        if tags is not None and not (
            (isinstance(tags, str) and tags) or (isinstance(tags, list) and all(isinstance(t, str) and t for t in tags))
        ):
            return f"track.tags={tags} is neither a tag nor a list of tags: give words, such as [baseline,night]"
        if not self.project:
            return "track.project is empty: give the name of a project"
        for key, text in (("project", self.project), ("entity", self.entity), ("group", self.group)):
            if text is not None and (len(text) > LONGEST or re.search(r"[/\\#?%:\x00-\x1f]", text)):
                return f"track.{key}={short(text)!r}: W&B takes at most {LONGEST} letters, and none of / \\ # ? % :"
        return None


@part("track", "tensorboard", "hvdllm.track.tensorboard:make", TrackerFacts("tensorboard"))
@dataclass
class TensorBoard(Settings):
    """TensorBoard's event files in the run's folder, all numbers by tokens."""
