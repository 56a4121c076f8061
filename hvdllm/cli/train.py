"""`hvdllm train`: compose, check, and let trainer/build.py run."""

from __future__ import annotations

import os
from typing import Any

from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.config.schema import Config
from hvdllm.world.detect import Place, place

USAGE = """hvdllm train [setting=value ...] [--cfg job] [--help]

Trains a transformer language model and writes runs/<name>/. As it stands: a small model on this machine's Python
standard library, in one to two minutes. Under a launcher every process is a rank:

  hvdllm train
  hvdllm train text=files text.path=notes/ budget_tokens=5e6
  horovodrun --gloo -np 2 hvdllm train experiment=laptop
  hvdllm train resume=runs/<name> budget_tokens=1e7
"""


def run(argv: list[str]) -> int:
    from hvdllm.cli.flags import settings_only
    from hvdllm.trainer.resume import with_run

    here = place()
    words = settings_only(argv, USAGE, compose.compose)
    if words is None:
        return 0
    words = with_run(words)
    config = compose.compose(words)
    check(config, here)
    set_threads(config, here)
    train(config, words, here)
    return 0


def set_threads(config: Config, here: Place) -> None:
    """Before the first tensor: left alone, two ranks on two cores ran 20 times slower."""
    import torch

    from hvdllm import device

    threads = config.device.threads or max(1, device.usable_cores() // here.local_size)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_num_threads(threads)


def train(config: Config, words: list[str], here: Place) -> None:
    from hvdllm.cli.display import make_show
    from hvdllm.trainer import build
    from hvdllm.world import signals

    world = open_world(config, here)
    signals.listen(world.asks, alone=world.size == 1)
    if here.launcher != "none":
        signals.watch_launcher(world.asks)
    with make_show(world.rank, here.launcher == "none") as show:
        build.run(config, words, here, world, show)
    world.close()


def open_world(config: Config, here: Place) -> Any:
    """Alone: no Horovod is imported."""
    if config.world.kind == "single" or here.launcher == "none":
        from hvdllm.world.single import SingleWorld

        return SingleWorld()
    from hvdllm.world.hvd import HorovodWorld

    return HorovodWorld(here, config.world.timeout_s)
