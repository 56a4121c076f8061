"""What goes to a screen, or to a file that people look at on one: no control characters but line ends and tabs.

A prompt, a sample, the name of a file, of a field or of a host, a setting and an error's words may be a stranger's, and
an escape sequence in them could retitle the terminal, hide lines or write to the clipboard. So commands run within
guarded(), where everything printed passes clean(), and whoever draws on a terminal takes console(), which cleans what
it is given and adds its own: nobody has to think of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as Console

# C0 (but \t and \n), DEL and C1; marks that turn the direction of writing; line ends that are none; lone surrogates.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    r"""The text with control characters as they are written in Python: \x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""The same, line ends (\n) and tabs included: for what is one line by its place, in a log or an error."""
    return clean(text).replace("\n", "\\n").replace("\t", "\\t")


class Guarded:
    """A stream of text that writes what it is given, cleaned; all else is the stream's behind it."""

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
    """Within, standard output and error are cleaned."""
    before = sys.stdout, sys.stderr
    guards = [one if one is None or isinstance(one, Guarded) else Guarded(one) for one in before]
    sys.stdout, sys.stderr = guards
    try:
        yield
    finally:
        # Where somebody else has put something in their place meanwhile, that stays.
        if sys.stdout is guards[0]:
            sys.stdout = before[0]
        if sys.stderr is guards[1]:
            sys.stderr = before[1]


def console(out: Any = None, **settings: Any) -> Console:
    """A console of rich on standard output (or `out`), which cleans what it is given before it adds colours and
    movements."""
    from rich.console import Console as Console
    from rich.segment import Segment

    class Cleaned(Console):
        def _render_buffer(self, buffer: Any) -> str:  # all that rich writes passes here, tables and live lines too
            return super()._render_buffer(
                one if one.control else Segment(clean(one.text), one.style, one.control) for one in buffer
            )

    behind = sys.stdout.behind if isinstance(sys.stdout, Guarded) else sys.stdout
    return Cleaned(file=out or behind, **settings)
