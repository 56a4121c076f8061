"""Cleans what goes to a screen, or to a file that people view on one, of control characters except line ends and tabs.

Prompts, samples, names of files, fields and hosts, settings and messages of errors may come from a stranger. An escape
sequence in them could retitle the terminal, hide lines or write to the clipboard. Commands therefore run within
guarded(), where everything that is printed passes clean(). Code that draws on a terminal uses console(), which cleans
what it is given before it adds its own sequences. No other code needs to think of this.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as Console

# C0 except \t and \n, DEL and C1; marks that change the direction of text; Unicode's other line ends; lone surrogates.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    r"""The text with control characters written as in Python source: \x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""The cleaned text with line ends and tabs also written as \n and \t, for one line of a log or an error."""
    return clean(text).replace("\n", "\\n").replace("\t", "\\t")


def brief(text: str, most: int = 900) -> str:
    """The text, or its beginning and its end if it is longer, since a sentence may quote a value of any length."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


class Guarded:
    """A text stream that cleans what is written to it. In all else it behaves like the stream behind it."""

    def __init__(self, behind: Any) -> None:
        self.behind = behind

    def write(self, text: str) -> int:
        self.behind.write(clean(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.behind)


@contextmanager
def guarded() -> Iterator[None]:
    """A context in which standard output and error are cleaned."""
    before = sys.stdout, sys.stderr
    guards = [one if one is None or isinstance(one, Guarded) else Guarded(one) for one in before]
    sys.stdout, sys.stderr = guards
    try:
        yield
    finally:
        # If other code has replaced them in the meantime, its streams stay.
        if sys.stdout is guards[0]:
            sys.stdout = before[0]
        if sys.stderr is guards[1]:
            sys.stderr = before[1]


def console(out: Any = None, **settings: Any) -> Console:
    """A console of rich that cleans what it is given before it adds colours and cursor movements.

    Args:
        out: the stream; None: standard output.
        settings: of rich's Console.
    """
    from rich.console import Console as Console
    from rich.segment import Segment

    class Cleaned(Console):
        def _render_buffer(self, buffer: Any) -> str:  # all that rich writes passes here, also tables and live lines
            return super()._render_buffer(
                one if one.control else Segment(clean(one.text), one.style, one.control) for one in buffer
            )

    behind = sys.stdout.behind if isinstance(sys.stdout, Guarded) else sys.stdout
    return Cleaned(file=out or behind, **settings)
