"""One rank of `hvdllm bench exchange`: an ordinary run of trainer/build.py, watched at every commit.

It sees what `hvdllm train` shows a person, on every rank, and writes what it noted when the run is over: the run itself
does nothing more than a file read and two clock reads a commit.

mark   [seconds (perf_counter), tokens committed, bytes sent by the world's count, bytes and packets that the interface
       has sent since it is there (null without one), seconds of CPU time of this process]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hvdllm import device as devices
from hvdllm.config.schema import Config
from hvdllm.trainer import account, build
from hvdllm.world.base import World
from hvdllm.world.detect import Place

COUNTERS = Path("/sys/class/net")


class Watch:
    """A Show that notes a mark at every commit."""

    def __init__(self, world: World, interface: str | None) -> None:
        self.world, self.marks = world, list[list[float | None]]()
        self.interface = COUNTERS / interface / "statistics" if interface else None

    def progress(self, values: dict[str, Any]) -> None:
        self.marks.append(
            [
                time.perf_counter(),
                values["tokens"],
                self.world.bytes_sent,
                *(self._count(name) for name in ("tx_bytes", "tx_packets")),
                time.process_time(),
            ]
        )

    def say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)

    def header(self, lines: dict[str, str]) -> None:
        pass

    def finish(self, end: dict[str, Any], run: str, sample: str) -> None:
        pass

    def _count(self, name: str) -> int | None:
        return int((self.interface / name).read_text()) if self.interface else None


def run(
    config: Config, words: list[str], place: Place, world: World, interface: str | None, folder: Path, index: int
) -> None:
    """Trains, and writes what this rank saw to rank-<index>.json. place, world: of the ranks that train together."""
    watch = Watch(world, interface)
    build.run(config, words, place, world, watch)
    seen = {
        "marks": watch.marks,
        "device": devices.name(devices.choose(config.device.kind, world.local_rank)),
        "threads": torch.get_num_threads(),
        "versions": account.versions(),
        "horovod": "horovod.torch" in sys.modules,  # which talks also when it has nothing to do
    }
    (folder / f"rank-{index}.json").write_text(json.dumps(seen))
