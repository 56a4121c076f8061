"""Is each document of a stream learnt exactly once, whatever is killed? Two real ranks train on a stream of numbered
documents; at random moments a rank, the reader or redis-server is killed (SIGKILL), and the same command goes on.

    python tests/exactly_once.py KILLS [SOURCE [SEED [HOW [EXCHANGE]]]]

SOURCE is redis, folder, or readers (two that share a folder), HOW one of launch.py's (real gloo: by horovodrun).

At the end the windows that were trained on (rounds.bin) and the documents in them (log) are compared with the stream,
and the records of the run with those of one that was never killed and read the same log and rounds.
See jobs/bench/exactly_once.sh.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from launch import HVDLLM, Job, records
from redis_server import Server

from hvdllm.online.log import Log
from hvdllm.online.rounds import Layout, Rounds, windows_of
from hvdllm.text.tokenize import BYTES, Tokenizer

RANKS_N, CONTEXT, BATCH = 2, 16, 16 * 12
SLICE = 1024 // CONTEXT  # windows
EACH = 30  # documents a kill
CURVE = ("tokens", "step", "loss", "grad_norm", "lr", "prequential", "prequential_recent", "prequential_whole")


def document(number: int) -> str:
    return f"[{number}] " + "the quick brown fox jumps over the lazy dog"[: 5 + number * 7 % 38]


@dataclass
class Written:
    """The stream, of which a thread writes more once it is allowed to."""

    source: str
    folder: Path
    server: Server | None
    allowed: int = 0
    count: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def write(self) -> None:
        while not self.done.wait(0.02):
            if self.count < self.allowed:
                with contextlib.suppress(*((self.server.error, OSError) if self.server else (OSError,))):
                    self._add(self.count)
                    self.count += 1

    def _add(self, number: int) -> None:
        if self.server is None:
            with (self.folder / f"{number % 3}.jsonl").open("a") as out:
                out.write(json.dumps({"text": document(number)}) + "\n")
            return
        try:
            self.server.client.xadd("documents", {"text": document(number)}, id=f"{number + 1}-0")
        except Exception as error:  # its answer was lost, but not the document: the same is not added twice
            if "equal or smaller" not in str(error):
                raise


def words(tmp: Path, name: str, budget: float, *source: str) -> list[str]:
    return [
        *HVDLLM, "train", "text=stream", *source, "text.tokenizer=bytes", "text.slice_tokens=1024", "model.layers=1",
        "model.width=16", "model.heads=2", f"model.context={CONTEXT}", f"batch_tokens={BATCH}", "text.replay=0.25",
        f"budget_tokens={budget}", f"name={name}", f"runs_dir={tmp}/runs", f"data_dir={tmp}/data", "device=cpu",
        "device.threads=1", f"log_every={BATCH}", "eval_every=0", f"save_every={5 * BATCH}", "sample_every=0",
        "schedule=constant", "schedule.warmup=0", "text.wait_s=0.3", "micro_batch=3",
    ]  # fmt: skip


def layout() -> Layout:
    """As the settings above make it."""
    from hvdllm.config.compose import compose

    config = compose([word for word in words(Path("/tmp"), "a", 1, "text.source=folder", "text.path=/tmp")[4:]])
    return Layout(CONTEXT, config.text.slice(config), config.text.held(config))


def reader_of(job: Job) -> int | None:
    return next(filter(job.reads, job.pids()), None)


def kill(job: Job, what: str, server: Server | None, draw: random.Random) -> bool:
    """Kills it. False if it does not live just now."""
    if what == "redis-server":
        assert server is not None
        server.kill()
        time.sleep(draw.uniform(0.0, 1.0))
        server.start()
        return True
    with contextlib.suppress(ValueError, ProcessLookupError):
        pid = reader_of(job) if what == "reader" else job.rank(int(what[-1]))
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def exactly_once(
    kills: int, source: str, seed: int, tmp: Path, how: str = "gloo", more: tuple[str, ...] = ()
) -> dict[str, int]:
    """How often each was killed, and what was trained on. Raises AssertionError."""
    draw, place = random.Random(seed), layout()
    inbox = tmp / "in"
    inbox.mkdir()
    server = Server(tmp) if source == "redis" else None
    stream = Written(source, inbox, server)
    total = EACH * (kills + 2)
    texts = [document(number) for number in range(total)]
    windows = place.fresh(sum(len(text) + 1 for text in texts))
    # A window may be left that is too little for two ranks. A quarter of each batch is drawn from the past.
    where = (
        [f"text.address={server.address}", "text.source=redis"]
        if server
        else ["text.source=folder", f"text.path={inbox}", f"text.readers={1 + (source == 'readers')}"]
    )
    where += [*more]
    command = words(tmp, "a", 1e12, *where)
    victims = [f"rank {rank}" for rank in range(RANKS_N)] + ["reader"] + ["redis-server"] * (server is not None)
    writer = threading.Thread(target=stream.write)
    writer.start()
    killed: Counter[str] = Counter()
    lives = 0
    run = tmp / "runs" / "a"

    def learnt() -> int:
        """Fresh windows up to the last whole round."""
        rounds = Rounds(run / "log")
        count = rounds.count()
        last = rounds.get(count - 1) if count else None
        return last.next if last else 0

    try:
        while True:
            lives += 1
            with Job(command, how, RANKS_N) as job:
                while job.process.poll() is None:
                    left = kills - killed.total()
                    stream.allowed = EACH * (killed.total() + 1) if left else total
                    if left:
                        end = time.monotonic() + draw.choice([0.0, 30.0, 30.0, 30.0])  # mostly once it trains
                        while reader_of(job) is None and job.process.poll() is None and time.monotonic() < end:
                            time.sleep(0.1)
                        time.sleep(draw.uniform(0.0, 4.0))
                        what = draw.choice(victims)
                        killed[what] += kill(job, what, server, draw)
                        if what.startswith("rank") and job.process.poll() is None:
                            time.sleep(0.2)
                    elif learnt() >= windows - 1:
                        time.sleep(1.0)
                        for pid in job.forks().values() or [job.rank(0)]:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGINT)
                        break
                    else:
                        time.sleep(0.1)
                done = job.wait(90.0)
                if not kills - killed.total() and learnt() >= windows - 1:
                    assert "stopped at" in done.out, done.out
                    break
                if draw.random() < 0.5:
                    job.until_gone()
    finally:
        stream.done.set()
        writer.join()
        if server is not None:
            server.close()
    return {**killed, "lives": lives, **compared(tmp, texts, place, how, more)}


def compared(tmp: Path, texts: list[str], place: Layout, how: str, more: tuple[str, ...]) -> dict[str, int]:
    folder = tmp / "runs" / "a" / "log"
    tokenizer = Tokenizer(BYTES)
    log = Log(folder, np.dtype(tokenizer.dtype))
    log.refresh()
    tokens = log.tokens(0, log.last.tokens)
    ends = np.flatnonzero(tokens == tokenizer.end) + 1
    read = [tokenizer.decode(each) for each in np.split(tokens, ends)[:-1]]
    assert ends[-1] == len(tokens) and Counter(read) == Counter(texts), "the log is not the stream"

    rounds, fresh = Rounds(folder), np.empty(0, np.int64)
    assert rounds.get(0) is not None
    count = rounds.count()
    parts, totals = [], [0]
    for number in range(count):
        found = rounds.get(number)
        assert found is not None
        rows, new = windows_of(found, number, place, 0)
        parts.append(rows[new])
        totals.append(totals[-1] + found.items * CONTEXT)
    fresh = np.concatenate(parts)
    expected = place.window(np.arange(len(fresh)))
    assert (fresh == expected).all(), "a window was left out, or trained on twice"
    held = {int(row) for k in range(place.slices(len(tokens)) + 1) for row in place.held_out(k)}
    last = int(fresh[-1])
    seen = sorted({*fresh.tolist(), *(row for row in held if row < last)})
    assert seen == list(range(last + 1)), "a window is neither trained on nor held out"
    commits = records(tmp / "runs" / "a", "commit")
    assert [record["tokens"] for record in commits] == sorted({record["tokens"] for record in commits})
    assert {record["tokens"] for record in commits} <= set(totals), "a commit lies between two rounds"
    assert commits[-1]["tokens"] >= totals[-2], "a round was left out"
    trained = sum(
        int(np.isin(np.arange(begin, end) // CONTEXT, fresh).any())
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    )

    # A run that was never killed, on the same log and the same rounds.
    (tmp / "none").mkdir()
    whole = tmp / "runs" / "b"
    readers = len(list(folder.glob("reader-?")))
    source = ["text.source=folder", f"text.path={tmp / 'none'}", f"text.readers={readers or 1}"]
    command = words(tmp, "b", commits[-1]["tokens"], *source, *more)
    with Job(command, how, RANKS_N) as job:
        job.until((whole / "log" / "index.jsonl").exists)
    for name in os.listdir(folder):
        if name.endswith((".bin", ".jsonl")) and not name.startswith(("asked", "pauses")):
            shutil.copy(folder / name, whole / "log" / name)
    for number in range(readers):
        shutil.copytree(folder / f"reader-{number}", whole / "log" / f"reader-{number}", dirs_exist_ok=True)
    with Job(command, how, RANKS_N) as job:
        done = job.wait(600.0)
        assert done.code == 0, done.out
    curves = [
        [tuple(record[key] for key in CURVE) for record in records(tmp / "runs" / name, "commit")] for name in "ab"
    ]
    differ = [number for number, (one, other) in enumerate(zip(*curves, strict=False)) if one != other]
    assert not differ, f"records {differ[:5]} differ: {curves[0][differ[0]]}, {curves[1][differ[0]]}"
    assert abs(len(curves[0]) - len(curves[1])) <= 1
    return {"documents": len(read), "trained or held out": trained, "rounds": count, "equal records": len(curves[1])}


def main(argv: list[str]) -> int:
    kills = int(argv[0])
    failed = False
    how, more = argv[3] if len(argv) > 3 else "gloo", tuple(f"exchange={each}" for each in argv[4:])
    for source in [argv[1]] if len(argv) > 1 else ["redis", "folder", "readers"]:
        seed = int(argv[2]) if len(argv) > 2 else int.from_bytes(os.urandom(2))
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as tmp:
            try:
                found = exactly_once(kills, source, seed, Path(tmp), how, more)
            except AssertionError as error:
                print(f"{source:8} seed {seed:<6} FAILED {error}", flush=True)
                failed = True
                continue
        shown = ", ".join(
            f"{value} {name}" if name in ("lives", "documents", "rounds") else f"{name} {value}"
            for name, value in found.items()
        )
        print(f"{source:8} seed {seed:<6} {shown}, {time.monotonic() - begin:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
