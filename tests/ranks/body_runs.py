"""Trains as many runs as the JSON file in argv[1] lists, [{"words": [...], "do": {...}}, ...], in one world."""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from pathlib import Path
from typing import Any

from meddle import meddle

from hvdllm.cli import train as command
from hvdllm.cli.display import make_show
from hvdllm.config.check import check
from hvdllm.settings import Config
from hvdllm.trainer import life
from hvdllm.trainer.resume import asked
from hvdllm.world import virtual
from hvdllm.world.detect import Place, place


def main() -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # whoever stands still says where
    specs, here, world = json.loads(Path(sys.argv[1]).read_text()), place(), None
    for spec in specs:
        config, words = asked(spec["words"])
        check(config, here)
        command.set_threads(config, here)
        if config.world.kind == "virtual":
            virtual.run(
                config.world.size, lambda each, c=config, w=words: live(c, w, here, each), hosts=config.world.hosts,
                links=command.simulated_links(config),
            )  # fmt: skip
            continue
        world = world or command.open_world(config, here)
        with meddle(here.rank, **spec.get("do", {})):
            live(config, words, here, world)
    if world is not None:
        world.close()


def live(config: Config, words: list[str], here: Place, world: Any) -> None:
    with make_show(world.rank, here.launcher == "none") as show:
        life.run(config, words, here, world, show)


if __name__ == "__main__":
    main()
