"""`--help` of the commands that take settings: every setting with its default, its unit and its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvdllm import screen
from hvdllm.config import compose, schema


def print_help(usage: str, config: Any) -> None:
    """usage: what stands on top. config: the composed one, whose values are shown as they are now."""
    from rich.markup import escape
    from rich.table import Table

    console = screen.console(highlight=False)
    console.print(escape(usage), soft_wrap=True)

    def table(title: str, settings: Any, prefix: str = "", without: frozenset[str] = frozenset()) -> None:
        grid = Table(
            title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), expand=False
        )
        grid.add_column("setting", no_wrap=True)
        grid.add_column("value", overflow="fold", max_width=14)
        grid.add_column("what it is", overflow="fold")
        for f in dataclasses.fields(settings):
            value = getattr(settings, f.name)
            if not dataclasses.is_dataclass(value) and f.name not in without:
                shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
                grid.add_row(prefix + f.name, escape(shown), escape(f.metadata["doc"]))
        console.print(grid)
        console.print()

    table("Settings (a name, = and a value)", config)
    for group, kinds in schema.SCHEMAS.items():
        chosen = getattr(config, group)
        known = frozenset(f.name for f in dataclasses.fields(chosen))
        table(f"{group}=..., one of: {', '.join(compose.options(group))}\n{_about(chosen)}", chosen, f"{group}.")
        for name, kind in kinds.items():
            if kind is not type(chosen):
                table(f"{group}={name}: {_about(kind())}", kind(), f"{group}.", known)
    console.print(f"experiment=..., whole experiments, one of: {', '.join(compose.options('experiment'))}")


def _about(settings: Any) -> str:
    return " ".join((type(settings).__doc__ or "").split())
