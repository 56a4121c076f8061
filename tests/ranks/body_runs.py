"""Trains as many runs as the JSON file in argv[1] lists, [{"words": [...], "do": {...}}, ...], in one world."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from meddle import meddle

from hvdllm.cli import train as command
from hvdllm.cli.display import make_show
from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.trainer import build
from hvdllm.trainer.resume import with_run
from hvdllm.world.detect import place


def main() -> None:
    specs, here, world = json.loads(Path(sys.argv[1]).read_text()), place(), None
    for spec in specs:
        words = with_run(spec["words"])
        config = compose.compose(words)
        check(config, here)
        command.set_threads(config, here)
        world = world or command.open_world(config, here)
        with make_show(world.rank, here.launcher == "none") as show, meddle(here.rank, **spec.get("do", {})):
            build.run(config, words, here, world, show)
    assert world is not None
    world.close()


if __name__ == "__main__":
    main()
