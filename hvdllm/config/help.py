"""`--help` of the commands that take settings: every setting with its default, its unit and its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvdllm.config import compose, schema


def print_help(usage: str, config: Any) -> None:
    """usage: what stands on top. config: the composed one, whose values are shown as they are now."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(escape(usage), soft_wrap=True)

    def table(title: str, settings: Any, prefix: str = "") -> None:
        grid = Table(
            title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), expand=False
        )
        grid.add_column("setting", no_wrap=True)
        grid.add_column("value", overflow="fold", max_width=14)
        grid.add_column("what it is", overflow="fold")
        for f in dataclasses.fields(settings):
            value = getattr(settings, f.name)
            if not dataclasses.is_dataclass(value):
                shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
                grid.add_row(prefix + f.name, escape(shown), escape(f.metadata["doc"]))
        console.print(grid)
        console.print()

    table("Settings (a name, = and a value)", config)
    for group in schema.SCHEMAS:
        settings = getattr(config, group)
        choices = ", ".join(compose.options(group))
        about = " ".join((type(settings).__doc__ or "").split())
        table(f"{group}=…, one of: {choices}\n  {about}", settings, f"{group}.")
        others = [k for k in schema.SCHEMAS[group].values() if k is not type(settings)]
        for kind in others:
            extra = {f.name for f in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(settings)}
            name = compose.option_name(group, kind())
            more = f" It has also: {', '.join(f'{group}.{n}' for n in sorted(extra))}." if extra else ""
            console.print(escape(f"  {group}={name}: {' '.join((kind.__doc__ or '').split())}{more}"))
        if others:
            console.print()
    console.print(f"experiment=…, whole experiments, one of: {', '.join(compose.options('experiment'))}")
