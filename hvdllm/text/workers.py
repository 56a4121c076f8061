"""Processes that encode a text, one a core. Each is a fresh Python that only imports this room.

It is never a fork, so it has no threads, no Horovod and no script of its parent. It talks over its own standard input
and output, and it ends when they close, whatever ended its parent. A message is 16 bytes, which say how long its two
parts are, then JSON, then bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from hvdllm.errors import RunError, UserError
from hvdllm.interpreter import PYTHON, found
from hvdllm.plain import Json
from hvdllm.text.corpus import Raw
from hvdllm.text.encode import Chunk, Encoder, Part, packed, unpacked

ALONE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a core each


class Workers:
    """Processes that encode chunks, and a thread here for each of them.

    Args:
        encoder: which each of them gets.
        count: how many there are.
    """

    def __init__(self, encoder: Encoder, count: int) -> None:
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._all = []
        self._count = count
        self._threads = ThreadPoolExecutor(count)
        described = encoder.json().encode()
        try:
            for _ in range(count):
                one = subprocess.Popen(
                    [*PYTHON, __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    env={**os.environ, **found(), **ALONE},
                    process_group=0,  # Ctrl-C is for the parent alone
                )  # fmt: skip
                self._all.append(one)
                self._threads.submit(self._begin, one, described)
        except OSError as error:
            self.close()
            raise RunError(
                f"a process that encodes text cannot be started ({error}): free memory, or processes"
            ) from None
        except BaseException:
            self.close()
            raise

    def _begin(self, one: subprocess.Popen[bytes], described: bytes) -> None:
        assert one.stdin is not None
        with contextlib.suppress(OSError):  # it has died, which the first chunk will say
            _send(one.stdin, {}, [described])
        self._idle.put(one)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Part]]:
        """The parts of these chunks, in order. No more than two chunks a process are in memory at a time.

        Raises UserError as Encoder.encode does, and RunError if a process has died.
        """
        waiting: deque[tuple[Chunk, Future[Part]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._ask, chunk)))
            if len(waiting) >= 2 * self._count:
                first, part = waiting.popleft()
                yield first, part.result()
        for first, part in waiting:
            yield first, part.result()

    def _ask(self, chunk: Chunk) -> Part:
        one = self._idle.get()
        assert one.stdin is not None and one.stdout is not None
        try:
            head = {
                "held_out": chunk.held_out, "raws": [(raw.name, raw.number, len(raw.data)) for raw in chunk.raws]
            }  # fmt: skip
            _send(one.stdin, head, [raw.data for raw in chunk.raws])
            answer, data = _received(one.stdout)
        except (OSError, EOFError):
            raise RunError(
                f"a process that encoded text has ended ({_why(one)}): free memory if it was too little, and start the "
                "same command again, which goes on from here"
            ) from None
        finally:
            self._idle.put(one)
        if "user" in answer:
            raise UserError(answer["user"])
        if "trace" in answer:
            raise RuntimeError(f"a process that encoded text has failed:\n{answer['trace']}")
        return unpacked(answer, data)

    def close(self) -> None:
        """Ends the processes at once, and what they still had to do with them."""
        for one in self._all:
            one.kill()
        self._threads.shutdown(cancel_futures=True)
        for one in self._all:
            for pipe in (one.stdin, one.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            one.wait()


def _why(one: subprocess.Popen[bytes]) -> str:
    try:
        code = one.wait(5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _send(file: IO[bytes], head: Json, data: list[bytes]) -> None:
    text = json.dumps(head).encode()
    sizes = (len(text), sum(map(len, data)))
    file.write(b"".join([*(size.to_bytes(8, "little") for size in sizes), text, *data]))
    file.flush()


def _received(file: IO[bytes]) -> tuple[Json, bytes]:
    """A message. Raises EOFError if there is none, or only a part of one."""
    sizes = file.read(16)
    if len(sizes) < 16:
        raise EOFError
    first, second = int.from_bytes(sizes[:8], "little"), int.from_bytes(sizes[8:], "little")
    text, data = file.read(first), file.read(second)
    if len(text) + len(data) < first + second:
        raise EOFError
    return json.loads(text), data


def work() -> None:
    """What a process does: encodes one chunk after the other, until its input closes."""
    asks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between the messages
    encoder = Encoder.load(_received(asks)[1].decode())
    while True:
        head, data = _received(asks)
        raws, at = [], 0
        for name, number, size in head["raws"]:
            raws.append(Raw(name, number, data[at : at + size]))
            at += size
        try:
            answer, parts = packed(encoder.encode(Chunk(raws, head["held_out"])))
        except UserError as error:
            answer, parts = {"user": str(error)}, []
        except Exception:
            answer, parts = {"trace": traceback.format_exc()}, []
        _send(answers, answer, parts)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError):
        work()
    sys.stdout.flush()
    os._exit(0)
