"""The flags of commands whose words are settings."""

from __future__ import annotations

from collections.abc import Callable

from hvdllm import registry
from hvdllm.config.compose import CONFIG_DIR, config_folder, plugins
from hvdllm.config.words import GROUPS
from hvdllm.errors import UserError
from hvdllm.settings import Config, meant

FLAGS = ("-h", "--help", "--cfg=job")


def settings_only(
    argv: list[str],
    usage: str,
    compose: Callable[[list[str]], Config],
    short: str = "",
    groups: tuple[str, ...] = GROUPS,
) -> list[str] | None:
    """Handles --help and --cfg job.

    Args:
        argv: the words of the command line.
        usage: the text above `--help all`.
        compose: composes settings, whose values are shown.
        short: the text above `--help`, if it is another one.
        groups: the groups that the command reads.

    Returns the words that are settings, or None if --help or --cfg job was asked for and has been printed.

    Raises UserError for an unknown flag.
    """
    argv = _with_folders(argv)
    words = [word for word in argv if not word.startswith("-") or word.startswith(CONFIG_DIR)]
    flags = [word for word in argv if word.startswith("-") and not word.startswith(CONFIG_DIR)]
    if "--cfg" in flags and "job" in words:
        words.remove("job")
        flags[flags.index("--cfg")] = "--cfg=job"
    for flag in flags:
        if flag not in FLAGS:
            hint = meant(flag, FLAGS)
            raise UserError(f"there is no flag {flag} here; settings are words such as seed=1, see --help{hint}")
    if "-h" in flags or "--help" in flags:
        from hvdllm.config.help import ALL, print_help

        topics = [word for word in words if "=" not in word]
        config = compose([word for word in words if "=" in word])
        for topic in topics or [None]:  # type: ignore[list-item]
            print_help(usage if topic == ALL else short or usage, config, topic, groups)
        return None
    if "--cfg=job" in flags:
        from hvdllm.config.compose import to_yaml

        print(to_yaml(compose(words)), end="")
        return None
    return words


def plugged(argv: list[str]) -> list[str]:
    """Imports the modules of `plugins=MODULES`, and returns the other words. For commands without settings."""
    registry.load(plugins(argv))
    return [word for word in argv if not word.startswith("plugins=")]


def _with_folders(argv: list[str]) -> list[str]:
    """Turns `--config-dir DIR` and `--config-dir=DIR` into one word each, as compose() takes it."""
    out, rest = [], iter(argv)
    for word in rest:
        if word == CONFIG_DIR.rstrip("="):
            out.append(config_folder(next(rest, "")))
        else:
            out.append(config_folder(word.removeprefix(CONFIG_DIR)) if word.startswith(CONFIG_DIR) else word)
    return out
