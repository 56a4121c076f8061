"""The readers of a stream: one, or several that are dealt to the hosts (text.readers).

The number of readers is a setting and not that of hosts. So a run goes on, with the same readers, on other hosts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from hvdllm.errors import UserError
from hvdllm.online.intake import Intake
from hvdllm.online.joined import Joiner
from hvdllm.online.log import Entry, of_reader
from hvdllm.online.reader import LOCK_S
from hvdllm.text.parts import READER, Stream
from hvdllm.world.base import World

SAME_S, LOOKS = 0.2, 10  # between two comparisons of a folder, and how many there are


class Readers:
    """The readers that this rank has started.

    Args:
        intakes: by the number of the reader; -1 if there is only one.
        joiner: joins their logs, on rank 0 if there are several.
    """

    def __init__(self, intakes: dict[int, Intake], joiner: Joiner | None = None) -> None:
        self._intakes, self._joiner = intakes, joiner

    def look(self) -> None:
        """Joins what has arrived. Raises RunError if a source cannot be read at all."""
        if self._joiner is not None:
            self._joiner.join()
        for each in self._intakes.values():
            each.check()

    def forget(self, entry: Entry) -> None:
        """Its source may forget what was read up to this entry, if it was read here."""
        if (intake := self._intakes.get(entry.reader)) is not None:
            intake.forget(entry.at)

    def close(self) -> None:
        for each in self._intakes.values():
            each.close()
        if self._joiner is not None:
            self._joiner.close()


def started(
    settings: Stream, folder: Path, tokenizer: Path, kind: np.dtype, world: World, say: Callable[[str], None]
) -> Readers | None:
    """Starts the readers of this rank. Collective if there are several.

    Args:
        settings: of the stream.
        folder: of the log.
        tokenizer: the path of its tokenizer.json.
        kind: of the tokens.
        world: the ranks. The first of each host starts its readers.
        say: gets what a person should know, on rank 0.

    Returns None if this rank starts none. Raises UserError on all ranks if readers cannot share the source.
    """
    if settings.source == "log":
        return None
    if settings.readers == 1:
        return Readers({-1: Intake(dealt(settings, 0), folder, tokenizer, say)}) if world.rank == 0 else None
    hosts, problem, joiner = hosts_of(settings, world), None, None
    if world.rank == 0:
        try:
            joiner = Joiner(folder, kind, settings.readers, LOCK_S, say)
        except UserError as error:
            problem = str(error)
    world.agree(problem, "stream.joiner")
    own = [k for k in range(settings.readers) if hosts[k % len(hosts)] == world.rank]
    if world.rank != 0 and not own:
        return None

    def tell(text: str) -> None:
        print(f"hvdllm: rank {world.rank}: {text}", file=sys.stderr, flush=True)

    intakes = {}
    for k in own:
        of_reader(folder, k).mkdir(exist_ok=True)
        share = (k, settings.readers) if settings.shared else (0, 1)
        intakes[k] = Intake(dealt(settings, k), of_reader(folder, k), tokenizer, tell if world.rank else say, *share)
    return Readers(intakes, joiner)


def hosts_of(settings: Stream, world: World) -> list[int]:
    """The first rank of each host. Collective. Raises UserError if readers share a folder that hosts do not."""
    own = json.dumps([world.local_rank == 0, None])
    first = [rank for rank, text in enumerate(world.texts(own, "stream.hosts")) if json.loads(text)[0]]
    if settings.source == "folder" and settings.shared and len(first) > 1:
        for _ in range(LOOKS):
            texts = world.texts(json.dumps(_looked(Path(str(settings.path)).expanduser())), "stream.hosts")
            if len({texts[rank] for rank in first}) == 1:
                return first
            time.sleep(SAME_S)  # a file was added between two looks
        raise UserError(
            f"text.path={settings.path} is not the same folder on all hosts: put {READER} into it, so that each "
            f"reader has a folder of its own, or read with text.readers=1"
        )
    return first


def _looked(folder: Path) -> list[int]:
    """What tells a folder from another of the same name on another host."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # which looks at the server, on NFS
    except OSError:
        return []
    try:
        found = os.fstat(handle)
        return [found.st_ino, found.st_ctime_ns]
    finally:
        os.close(handle)


def dealt(settings: Stream, number: int) -> Stream:
    """The settings of one reader: its number stands for {reader}."""

    def of(value: str) -> str:
        return value.replace(READER, str(number))

    path = of(settings.path) if isinstance(settings.path, str) else settings.path
    return replace(settings, path=path, key=of(settings.key), address=of(settings.address))
