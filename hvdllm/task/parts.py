"""What a run can learn: the settings of each task."""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.registry import TaskFacts, part
from hvdllm.settings import Config, Settings, Setup, setting


@dataclass
class Task(Settings):
    """What is common to every task."""

    def units(self, config: Config) -> int | None:
        """How many units every item counts, or None if only the data tells."""
        return 1


@part(
    "task", "causal_lm", "hvdllm.task.causal_lm", TaskFacts("tokens", "sequences", model="gpt", text=True, writes=True)
)
@dataclass
class CausalLM(Task):
    """The next token of a text, from all tokens before it in the same window. Units are tokens."""

    def units(self, config: Config) -> int | None:
        return int(config.model.context)

    def refusal(self, setup: Setup) -> str | None:
        batch, context = setup.config.batch_tokens, setup.config.model.context
        if batch % context:
            near = max(1, round(batch / context)) * context
            return f"batch_tokens={batch} is no multiple of model.context={context}: {near} would be the nearest"
        return None


@part("task", "masked_lm", "hvdllm.task.masked_lm", TaskFacts("tokens", "sequences", model="bert", text=True))
@dataclass
class MaskedLM(Task):
    """Tokens of a text that were masked, from all others in the window (BERT). Units are masked tokens."""

    share: float = setting(
        0.15, "share of the tokens of a window that are to be guessed; .15 as in BERT", least=1e-6, most=1
    )

    def units(self, config: Config) -> int | None:
        return max(1, round(self.share * int(config.model.context)))
