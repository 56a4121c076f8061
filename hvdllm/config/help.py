"""`--help` of the commands that take settings. It shows one screen, a group, one setting, or everything."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping

from hvdllm import registry, screen
from hvdllm.config import compose
from hvdllm.config.words import GROUPS
from hvdllm.errors import UserError
from hvdllm.settings import LARGEST, Chosen, Config, meant

# The settings of no group that the first screen shows.
OFTEN = ("name", "budget_tokens", "batch_tokens", "micro_batch", "seed", "resume", "eval_every", "save_every")
ALL, OWN = "all", "settings"  # topics beside the groups: everything, and the settings of no group


def print_help(usage: str, config: Config, topic: str | None = None, groups: tuple[str, ...] = GROUPS) -> None:
    """Prints the help of a command.

    Args:
        usage: what stands on top.
        config: the composed configuration, whose values are shown.
        topic: a group, a setting, ALL or OWN; None: one screen.
        groups: the groups that the command reads.

    Raises UserError for an unknown topic.
    """
    console = screen.console(highlight=False, markup=False, emoji=False)
    known = (*GROUPS, ALL, OWN, *compose.settings())
    if topic is not None and topic not in known:
        raise UserError(
            f"--help {topic}: there is no such group or setting{meant(topic, known)}; groups are "
            f"{', '.join(groups)}, and {ALL} is everything"
        )
    if topic in (None, ALL):
        console.print(usage, soft_wrap=True)
    if topic is None:
        _screen(console, config, groups)
    elif topic in GROUPS:
        _group(console, config, topic)
    elif topic in (OWN, ALL):
        _table(console, "Settings (a name, = and a value)", config)
        for group in GROUPS if topic == ALL else ():
            _group(console, config, group)
    else:
        _one(console, config, topic)


# ------------------------------------------------------------------ inside
def _screen(console: screen.Console, config: Config, groups: tuple[str, ...]) -> None:
    """Prints the groups with their options, and the settings that are needed most."""

    def line(left: str, right: str, cut: bool = False) -> None:
        if cut:
            console.print(f"  {left:24} {right}", overflow="ellipsis", no_wrap=True)
        else:
            first = f"  {left:24} "
            print(
                textwrap.fill(right, max(console.width, 60), initial_indent=first, subsequent_indent=" " * len(first))
            )

    console.print("groups (chosen), the options of each; their settings are GROUP.SETTING=VALUE")
    for group in groups:
        now = "" if group == "experiment" else f" ({registry.name_of(group, getattr(config, group))})"
        line(group + now, " ".join(compose.options(group)))
    if set(groups) >= set(registry.GROUPS):
        console.print("\nsettings of no group, some of them")
        for f in dataclasses.fields(config):
            if f.name in OFTEN:
                line(f"{f.name}={_shown(getattr(config, f.name))}", f.metadata["doc"], cut=True)
    example = "exchange" if "exchange" in groups else groups[0]
    console.print(
        f"\n--help {example} explains a group, --help {OWN} those of none, --help optim.lr one, --help {ALL} "
        "everything;\n--cfg job prints what words come to.", soft_wrap=True,
    )  # fmt: skip


def _group(console: screen.Console, config: Config, group: str) -> None:
    if group == "experiment":
        console.print(f"experiment=..., whole experiments, one of: {', '.join(compose.options('experiment'))}")
        return
    chosen = getattr(config, group)
    known = frozenset(f.name for f in dataclasses.fields(chosen))
    title = f"{group}=..., one of: {', '.join(compose.options(group))}\n{_about(chosen)}"
    _table(console, title, chosen, f"{group}.")
    for name, kind in registry.kinds(group).items():
        if kind is not type(chosen):
            _table(console, f"{group}={name}: {_about(kind())}", kind(), f"{group}.", known)


def _one(console: screen.Console, config: Config, key: str) -> None:
    """Prints one setting: its default in each option that has it, and its description whenever that differs."""
    group, _, name = key.rpartition(".")
    kinds = {"": config} if not group else {option: kind() for option, kind in registry.kinds(group).items()}
    said = ""
    for option, settings in kinds.items():
        for f in dataclasses.fields(settings):
            if f.name == name:
                of = f" ({group}={option})" if option else ""
                console.print(f"{key}={_shown(getattr(settings, name))}{of}", soft_wrap=True)
                if f.metadata["doc"] != said:
                    console.print(f"  {(said := f.metadata['doc'])}{_bounds(f.metadata)}", soft_wrap=True)


def _bounds(about: Mapping[str, Chosen]) -> str:
    if about["choices"]:
        return f"; one of {', '.join(about['choices'])}"
    least = f"at least {about['least']:g}" if about["least"] is not None else ""
    most = f"at most {about['most']:,.12g}" if least and about["most"] != LARGEST else ""
    return f"; {', '.join(filter(None, (least, most)))}" if least else ""


def _table(
    console: screen.Console, title: str, settings: Chosen, prefix: str = "", without: frozenset[str] = frozenset()
) -> None:
    from rich.table import Table

    width = min(console.width, 80)  # of a part without settings too, whose title would be broken otherwise
    grid = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), min_width=width
    )  # fmt: skip
    grid.add_column("setting", no_wrap=True)
    grid.add_column("value", overflow="fold", max_width=14)
    grid.add_column("what it is", overflow="fold")
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if not dataclasses.is_dataclass(value) and f.name not in without:
            grid.add_row(prefix + f.name, _shown(value), f.metadata["doc"])
    console.print(grid)
    console.print()


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _about(settings: object) -> str:
    return " ".join((type(settings).__doc__ or "").split())
