"""One rank of `hvdllm bench exchange`: an ordinary run of trainer/assemble.py, watched at every commit.

It sees, on every rank, what `hvdllm train` shows a person, and writes what it noted when the run is over. At a commit
the run does no more than read a file and two clocks.

mark   [seconds (perf_counter), tokens committed, bytes sent by the world's count, bytes and packets that the interface
       has sent since it was made (null without an interface), seconds of CPU time of this process]

When the run is over and nothing computes, the same ranks sum their gradients on the wire a few times more, which shows
what a sum costs on idle cores. This is left out if the library of a reference makes the sums.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from hvdllm import device as devices
from hvdllm.flat import Flat
from hvdllm.plain import Json
from hvdllm.settings import Config
from hvdllm.task.causal_lm import CausalLM
from hvdllm.text.tokenize import Tokenizer
from hvdllm.trainer import account, assemble
from hvdllm.trainer.life import run as train
from hvdllm.world.base import World, from_first
from hvdllm.world.detect import Place

COUNTERS = Path("/sys/class/net")
SUMS = 5  # that are measured, after one that is not
LATE = 10**15  # committed tokens at which the warm-up of every wire is over


class Stopwatch:
    """A Show that notes a mark at every commit."""

    def __init__(self, world: World, interface: str | None) -> None:
        self.world, self.marks = world, list[list[float | None]]()
        self.interface = COUNTERS / interface / "statistics" if interface else None

    def progress(self, values: Json) -> None:
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

    def finish(self, end: Json, run: str, sample: str) -> None:
        pass

    def _count(self, name: str) -> int | None:
        return int((self.interface / name).read_text()) if self.interface else None


def run(
    config: Config, words: list[str], place: Place, world: World, interface: str | None, folder: Path, index: int
) -> None:
    """Trains, and writes what this rank saw to rank-<index>.json in `folder`.

    `place` and `world` are those of the ranks that train together. `interface` is the one whose counters are read.
    """
    watch = Stopwatch(world, interface)
    train(config, words, place, world, watch)
    sums = sums_alone(config, world, folder) if world.size > 1 and not assemble.is_reference(config) else None
    seen = {
        "sums": sums,
        "marks": watch.marks,
        "device": devices.name(devices.choose(config.device.kind, world.local_rank, no_cuda=world.no_cuda)),
        "threads": torch.get_num_threads(),
        "versions": account.versions(),
        "horovod": "horovod.torch" in sys.modules,  # it sends messages also when it has nothing to do
    }
    (folder / f"rank-{index}.json").write_text(json.dumps(seen))


def sums_alone(config: Config, world: World, folder: Path) -> Json:
    """The seconds of each sum over all buckets of the run's model, and the bytes that one sum sends. Collective."""
    device = devices.choose(config.device.kind, world.local_rank, no_cuda=world.no_cuda)
    tokenizer = from_first(world, lambda: next(folder.glob("runs/*/tokenizer.json")).read_text(), "bench.tokenizer")
    model = assemble.build_model(CausalLM(config, Tokenizer(tokenizer).vocab), device)
    flat = Flat(model, world.size, assemble.bucket_bytes(config, model))
    wire = assemble.build_wire(config, world, flat)
    values = torch.randn(len(flat.g), generator=torch.Generator().manual_seed(world.rank)).to(flat.g)
    seconds, sent = [], 0.0
    for turn in range(SUMS + 1):
        flat.g.copy_(values)
        wire.begin(LATE, 1.0 / config.batch_tokens)
        world.texts("", "bench.ready")
        before, begin = world.bytes_sent, time.perf_counter()
        flights = [
            wire.sum(flat.g[bucket.span.start : bucket.span.stop], f"grad.{bucket.index}") for bucket in flat.buckets
        ]
        for flight in flights:
            flight.land()
        if turn:
            seconds.append(time.perf_counter() - begin)
        sent = world.bytes_sent - before
    return {"seconds": seconds, "bytes": sent}
