"""The process that reads a source and appends to a log. A rank starts it, and starts it again if it dies (intake.py).

    python -m hvdllm.online.reader FILE_DESCRIPTOR

It gets JSON lines through the descriptor: first what it is to read, then places up to which the source may forget. When
the descriptor is closed it ends, whatever ended its parent. On standard output it says what a person should know, as
JSON lines. Its standard input is that of the run, for text.source=stdin.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.online import log, sources
from hvdllm.online.log import Log, Writer
from hvdllm.online.sources import Source, Taken
from hvdllm.plain import Json
from hvdllm.text.parts import Stream
from hvdllm.text.tokenize import Tokenizer

ASIDE = "aside.jsonl"  # beside the log: what could not be read
WAIT_S = 0.5
LOCK_S = 12.0  # seconds that the reader of a run that was killed may take to end
FULL_S = 2.0  # seconds after which a full disk is tried again
MEMORY = 4 * 2**30  # bytes that it may take: what a server answers is larger only where its entries grew suddenly


def task(settings: Stream, folder: Path, tokenizer: Path, number: int, of: int) -> bytes:
    """The first line that a reader gets. It is the reader `number` among `of`."""
    given = {
        "settings": asdict(settings), "folder": str(folder), "tokenizer": str(tokenizer), "number": number, "of": of,
    }  # fmt: skip
    return json.dumps(given).encode() + b"\n"


def say(kind: str, what: str) -> None:
    print(json.dumps({kind: what}), flush=True)


def copy(source: Source, writer: Writer, tokenizer: Tokenizer, forget: Callable[[], Json | None]) -> None:
    """Appends what arrives, until `forget` raises EOFError. It returns a place that may be forgotten, or None."""
    full = told = False
    waiting: Taken | None = None  # what could not be appended
    end = np.array([tokenizer.end], tokenizer.dtype)
    while True:
        if (at := forget()) is not None:
            source.forget(at)
        taken = waiting or source.read(WAIT_S)
        if taken.nothing:
            writer.sync()
            continue
        ids = [part for each in tokenizer.encode(taken.texts) for part in (each, end)] if taken.texts else []
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in taken.texts)
        try:
            if taken.aside and not told:
                with untrusted.appended(writer.folder / ASIDE) as file:
                    file.write(sources.told(taken.aside))
                told = True
            at = taken.at | ({"over": True} if taken.over else {})
            writer.append(ids, len(taken.texts), size, at, len(taken.aside), taken.lost)
        except OSError as error:
            if not full:
                say("say", log.full(writer.folder, error))
            waiting, full = taken, True
            time.sleep(FULL_S)
            continue
        if full:
            say("say", f"{writer.folder} can be written again")
        told = False
        waiting, full = None, False
        if taken.aside:
            where, why, _ = taken.aside[0]
            say("aside", f"{where} was set aside ({why}), see {writer.folder / ASIDE}")
        if taken.lost:
            say(
                "say",
                f"{taken.lost:,} entries were gone from the stream before they were read: a gap in what is learnt",
            )
        if taken.over:
            writer.sync()
            say("say", "the stream has ended: what has arrived is trained on")
            while True:  # until the run ends
                forget()
                time.sleep(WAIT_S)


def main(descriptor: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    orders: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
    stream = os.fdopen(descriptor, "rb")
    given = json.loads(stream.readline())

    def listen() -> None:
        for line in stream:
            orders.put(json.loads(line))
        orders.put(None)
        time.sleep(10)
        os._exit(0)  # a source that hangs does not keep it

    threading.Thread(target=listen, name="orders", daemon=True).start()

    def forget() -> Json | None:
        found = None
        while not orders.empty():
            if (order := orders.get()) is None:
                orders.put(None)
                if found is None:
                    raise EOFError
                break  # what may be forgotten comes first
            found = order
        return found

    try:
        settings = Stream(**given["settings"])
        tokenizer = Tokenizer.load(Path(given["tokenizer"]))
        kind, folder = np.dtype(tokenizer.dtype), Path(given["folder"])
        share = sources.Share(given["number"], given["of"])
        source = sources.made(settings, lambda what: say("say", what), share)
        writer = Writer(folder, kind, LOCK_S)
        try:
            try:
                source.begin(entry.at for entry in Log(folder, kind).refresh())
            except (ValueError, TypeError, AttributeError):
                raise UserError(f"{folder} was not read from text.source={settings.source}: take a new run") from None
            copy(source, writer, tokenizer, forget)
        finally:
            writer.close()
    except EOFError:
        pass
    except UserError as error:
        say("error", str(error))


if __name__ == "__main__":
    main(int(sys.argv[1]))
