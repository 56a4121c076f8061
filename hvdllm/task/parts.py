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
        return None if config.text.conversations else int(config.model.context)

    def refusal(self, setup: Setup) -> str | None:
        if self.units(setup.config) is None:
            return None
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

    def refusal(self, setup: Setup) -> str | None:
        if setup.config.text.conversations:
            return "task=masked_lm with text=chat: it reads windows of text, give text=files or task=causal_lm"
        return None


@part("task", "images", "hvdllm.task.images", TaskFacts("images", "images", model="resnet"))
@dataclass
class Images(Task):
    """The class of an image. The digits that come with hvdllm, or folders of PNG and JPEG files. Units are images."""

    path: str | None = setting(
        None,
        "folder with a folder of .png, .jpg or .jpeg files for each class; null: 1,797 digits of 8 x 8 pixels",
        ours=True,
    )
    validation: str | None = setting(
        None,
        "such a folder of held-out images, with the same classes; null: chosen by a hash of their content",
        ours=True,
    )
    validation_share: float = setting(0.1, "share of images held out where task.validation is null", least=0, most=0.9)
    size: int = setting(8, "height and width, in pixels, to which images are scaled", least=4, most=4096)
    channels: int = setting(1, "channels of an image: 1 (grey) or 3 (red, green and blue)", least=1, most=3)
    shift: int = setting(
        1, "augmentation: each image is moved by up to so many pixels, another way in each epoch", least=0, most=1024
    )
    flip: bool = setting(False, "augmentation: half of the images are mirrored, others in each epoch")

    def refusal(self, setup: Setup) -> str | None:
        if self.channels == 2:
            return "task.channels=2: give 1 (grey) or 3 (red, green and blue)"
        if self.shift >= self.size:
            return f"task.shift={self.shift} would move images of task.size={self.size} out of sight: give less"
        if self.path is None and self.validation is not None:
            return "task.validation without task.path: the digits hold out images of their own, leave it out"
        return None


@part("task", "own", None, TaskFacts("units", "items", model="own", nats=False))
@dataclass
class Own(Task):
    """A model, a data set and a loss of your own, given to hvdllm.Session. It has no command."""

    size: int = setting(0, "items of the data set; hvdllm.Session sets it, so that a shorter one is noticed", least=0)
    each: float = setting(1.0, "units that an item counts in the mean, as hvdllm.Session was told", least=1e-9)

    def units(self, config: Config) -> int | None:
        return int(self.each) if self.each == int(self.each) else None

    def refusal(self, setup: Setup) -> str | None:
        if not self.size:
            return "task=own has no command: it is what hvdllm.Session trains, with data of at least one item"
        return None
