"""The flags of the commands whose words are settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdllm.config.compose import CONFIG_DIR, config_folder
from hvdllm.errors import UserError


def settings_only(argv: list[str], usage: str, compose: Callable[[list[str]], Any]) -> list[str] | None:
    """The words that are settings. None: --help or --cfg job was asked for, and has been printed."""
    argv = _with_folders(argv)
    words = [word for word in argv if not word.startswith("-") or word.startswith(CONFIG_DIR)]
    flags = [word for word in argv if word.startswith("-") and not word.startswith(CONFIG_DIR)]
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


def _with_folders(argv: list[str]) -> list[str]:
    """`--config-dir DIR` and `--config-dir=DIR` as one word each, which compose() understands."""
    out, rest = [], iter(argv)
    for word in rest:
        if word == CONFIG_DIR.rstrip("="):
            out.append(config_folder(next(rest, "")))
        else:
            out.append(config_folder(word.removeprefix(CONFIG_DIR)) if word.startswith(CONFIG_DIR) else word)
    return out
