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
        return None if config.text.conversations or config.text.packed else int(config.model.context)

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
        if setup.config.text.packed:
            return "task=masked_lm with text=packed: it reads windows of text, give text=files or task=causal_lm"
        return None


@part("task", "images", "hvdllm.task.images", TaskFacts("images", "images", model="resnet", usual=("batch_tokens=64",)))
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


@part(
    "task", "ratings", "hvdllm.task.ratings", TaskFacts("clicks", "clicks", model="towers", usual=("micro_batch=2048",))
)
@dataclass
class Ratings(Task):
    """Whether a user clicks on an item: a recommender. Clicks of known probabilities that are drawn, or tables of .csv
    or .parquet. Units are rows of the data (clicks)."""

    path: str | None = setting(
        None, "a .csv or .parquet file, or a folder of them; null: clicks drawn at known probabilities", ours=True
    )
    user_column: str = setting("user", "column of the users' ids")
    item_column: str = setting("item", "column of the items' ids")
    label_column: str = setting("label", "column of the clicks (0 to 1) or ratings (with task.threshold)")
    threshold: float | None = setting(
        None,
        "ratings of at least so much are clicks, lower ones are none; null: labels lie between 0 and 1",
        least=-1e9,
        most=1e9,
    )
    validation_share: float = setting(
        0.1, "share of the pairs of user and item held out, by a hash; equal pairs are on one side", least=0, most=0.9
    )
    users: int | None = setting(
        None,
        "rows of the table of users; ids of files are then whole numbers below it; null: as many as the files name, "
        "under any ids, or 400 that are drawn",
        least=1,
        most=2**31 - 65,
    )
    items: int | None = setting(None, "the same of items; null: as named, or 200", least=1, most=2**31 - 65)
    clicks: int | None = setting(None, "how many are drawn; null: 100,000", least=1, most=100_000_000)
    sparse: bool = setting(
        False,
        "rows of the tables travel in place of tables, and only they are updated, by an optimizer of the tables' own; "
        "false: tables are ordinary parameters, which every exchange trains",
    )
    table_optim: str = setting(
        "adagrad",
        "where task.sparse: adagrad (row-wise, one number a row; Naumov et al., 2019) or sgd (plain descent)",
        choices=("adagrad", "sgd"),
    )
    table_lr: float | None = setting(
        None, "where task.sparse: peak learning rate of the tables, under the schedule; null: 0.1", least=0
    )
    drawn_by: int = setting(0, "seed of the clicks that are drawn, whatever the run's seed is", least=0, most=2**32 - 1)

    def refusal(self, setup: Setup) -> str | None:
        blank = type(self)()
        of_files = ("user_column", "item_column", "label_column", "threshold")
        for name in of_files if self.path is None else ("clicks", "drawn_by"):
            if getattr(self, name) != getattr(blank, name):
                where = (
                    "without task.path: clicks are drawn" if self.path is None else "with task.path: nothing is drawn"
                )
                return f"task.{name} {where}, so nothing reads it; leave it out"
        if not self.sparse and (self.table_lr is not None or self.table_optim != blank.table_optim):
            return "task.table_lr and task.table_optim are read where task.sparse=true: give that, or leave them out"
        if len({self.user_column, self.item_column, self.label_column}) < 3:
            return "task.user_column, task.item_column and task.label_column must be three columns: give each its own"
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
