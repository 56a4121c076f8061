"""What a run can learn: the settings of each task."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import TaskFacts, part
from hvdllm.settings import Config, Settings


@dataclass
class Task(Settings):
    """What is common to every task."""

    def units(self, config: Config) -> int | None:
        """How many units every item counts, or None if only the data tells."""
        return 1


@part("task", "causal_lm", "hvdllm.task.causal_lm", TaskFacts("tokens", "sequences", model="gpt", text=True))
@dataclass
class CausalLM(Task):
    """The next token of a text, from all tokens before it in the same window. Units are tokens."""

    def units(self, config: Config) -> int | None:
        return int(config.model.context)
