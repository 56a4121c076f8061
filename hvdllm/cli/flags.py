"""The flags of the commands whose words are settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdllm.errors import UserError


def settings_only(argv: list[str], usage: str, compose: Callable[[list[str]], Any]) -> list[str] | None:
    """The words that are settings. None: --help or --cfg job was asked for, and has been printed."""
    words = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    if "--cfg" in flags and "job" in words:
        words.remove("job")
        flags[flags.index("--cfg")] = "--cfg=job"
    for flag in flags:
        if flag not in ("-h", "--help", "--cfg=job"):
            raise UserError(f"there is no flag {flag} here: settings are words such as seed=1; see --help")
    if "-h" in flags or "--help" in flags:
        from hvdllm.config.help import print_help

        print_help(usage, compose(words))
        return None
    if "--cfg=job" in flags:
        from hvdllm.config.compose import to_yaml

        print(to_yaml(compose(words)), end="")
        return None
    return words
