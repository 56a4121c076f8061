"""The words of a command line, `setting=value`. Only this module reads values before Hydra sees them.

- Text stays as it is typed: name=84e1573 is not a number, and resume=runs/s/optim.lr=0.001,seed=1 is one path.
- Whole numbers may be written as 1e6, 64k, 1.5M or 2B (thousands, millions, billions).
- The name of an option may be followed by settings, each after a plus: exchange=diloco+exchange.local_steps=10.
- Text in quotes or with backslashes means what it means to Hydra.
- Under `train -m` commas separate the values of any setting. A text with commas must be quoted there, unless it is the
  path of something that exists.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cache

from hvdllm import registry
from hvdllm.settings import Config

GROUPS = ("experiment", *registry.GROUPS)
FUNCTION = re.compile(r"(choice|range|interval|glob|tag|shuffle|sort|int|float|str|bool|json_str)\(.*\)", re.S)
NUMBER = re.compile(r"(?<![\w.+-])([0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE]\+?([0-9]+))?([kKmMbBgG]?)(?![\w.])")
TIMES = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9}  # powers of ten
KINDS = {"int": "int", "int | None": "int", "str": "text", "str | None": "text?", "Several": "texts", "Numbers": "ints"}
LONGEST = 30  # the most digits of a number that is written out; the bounds of settings are far below


def key_of(word: str) -> str:
    """The key of a word: that of `+optim.lr=1` is optim.lr."""
    return word.lstrip("+~").partition("=")[0]


def value_of(word: str) -> str:
    """The value of a word as plain text, with Hydra's quotes and backslashes undone."""
    text = unquoted(word.partition("=")[2])
    return re.sub(r"(\\+)\$\{", lambda found: "\\" * (len(found[1]) // 2) + "${", text)


def of(key: str, text: str) -> str:
    """The word that gives a setting exactly this text. `${...}` in it is not looked up."""
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)
    return f"{key}={quoted(literal)}"


def last(words: Sequence[str], key: str, default: str) -> str:
    """The value of the last word for a setting as plain text, or `default` if there is none."""
    return next((value_of(word) for word in reversed(words) if key_of(word) == key), default)


def expand(word: str) -> list[str]:
    """Splits `exchange=diloco+exchange.local_steps=10` into its two words. Any other word stays as it is."""
    key, equals, value = word.partition("=")
    if not equals or key not in GROUPS:
        return [word]
    first, *more = re.split(r"\+(?=[A-Za-z_][\w./]*=)", unquoted(value))
    return [f"{key}={first}", *more] if more else [word]


def typed(word: str, sweep: bool = False) -> str:
    """The word in the form that Hydra must read. sweep: whether commas separate values."""
    key, equals, value = word.partition("=")
    kind = _kinds().get(key.lstrip("+"))
    if not equals or key.startswith("~") or (kind == "text?" and value == "null"):
        return word
    if sweep and FUNCTION.fullmatch(value):
        return f"{key}={_written_out(value) if kind == 'int' else value}"
    if kind == "int":
        return f"{key}={_written_out(value)}"
    if kind == "ints":
        inside = value[1:-1] if value[:1] + value[-1:] == "[]" else None
        return word if inside is None else f"{key}=[{','.join(_written_out(part.strip()) for part in split(inside))}]"
    if key in GROUPS and sweep:
        return f"{key}={','.join(quoted(part) if '+' in part else part for part in split(value))}"
    if kind is None:
        return word
    several = split(value) if sweep and not os.path.exists(os.path.expanduser(unquoted(value))) else [value]
    return f"{key}={','.join(_text(part, kind) for part in several)}"


def plain(word: str) -> str:
    """The word without quotes around its text, for names of folders and for messages."""
    key, _, value = word.partition("=")
    return f"{key}={unquoted(value)}" if is_text(word) else word


def is_text(word: str) -> bool:
    """Whether a word gives a setting whose values are text."""
    return _kinds().get(key_of(word)) not in (None, "int", "ints")


def split(value: str) -> list[str]:
    """Splits a value at commas that are outside quotes and brackets."""
    parts, depth, quote, at = [""], 0, "", 0
    while at < len(value):
        letter = value[at]
        if letter == "\\" and at + 1 < len(value):
            letter, at = value[at : at + 2], at + 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        at += 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def quoted(text: str) -> str:
    """The text as a quoted string of Hydra's grammar, in which backslashes count only before a quote."""
    inner = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", inner) + "'"


def unquoted(value: str) -> str:
    """The inverse of `quoted`. A value without quotes loses only Hydra's backslashes."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        mark, inner = value[0], value[1:-1]
        if not re.search(rf"(?<!\\)(?:\\\\)*{mark}", inner):
            whole = re.sub(rf"(\\*)\\{mark}", lambda found: "\\" * (len(found[1]) // 2) + mark, inner)
            return re.sub(r"(\\+)$", lambda found: "\\" * (len(found[1]) // 2), whole)
    return re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value)


# ------------------------------------------------------------------ inside
def _text(value: str, kind: str) -> str:
    stripped = value.strip()
    if kind == "texts" and (value == "null" or (stripped.startswith("[") and stripped.endswith("]"))):
        if value == "null" or not stripped[1:-1].strip():
            return value
        return "[" + ",".join(quoted(unquoted(part.strip())) for part in split(stripped[1:-1])) + "]"
    return quoted(unquoted(value))


def _written_out(value: str) -> str:
    """Writes 1e6, 64k and 1.5M as digits, because OmegaConf does not take a float for an int."""

    def digits(found: re.Match[str]) -> str:
        power = int((found[2] or "0")[:4]) + TIMES[found[3].lower()]
        if power > LONGEST:
            return found[0]
        number = Decimal(found[1].replace("_", "")).scaleb(power)
        return str(int(number)) if number == int(number) else found[0]

    return NUMBER.sub(digits, value)


def _kinds() -> dict[str, str]:
    return _kinds_of(sum(len(kinds) for kinds in registry.all_kinds().values()))


@cache
def _kinds_of(parts: int) -> dict[str, str]:
    """The kind of each setting: int, ints (a list), text, text? (or null) or texts (or a list). Hydra reads others.

    parts: how many parts are registered. It is a key of the cache, since plugins may add some.
    """
    fields = [("", f) for f in dataclasses.fields(Config) if f.name not in registry.GROUPS]
    for group, kinds in registry.all_kinds().items():
        fields += [(f"{group}.", f) for kind in kinds.values() for f in dataclasses.fields(kind)]
    out: dict[str, str] = {}
    for prefix, f in fields:
        kind = KINDS.get(str(f.type))
        if kind is not None and not f.metadata["choices"]:
            out[prefix + f.name] = kind
    return out
