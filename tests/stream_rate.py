"""How fast a stream is read and trained on.

    python tests/stream_rate.py intake [DOCUMENTS]     documents of 1 kB a second from Redis into the log, on one core
    python tests/stream_rate.py train [PAIRS]          tokens a second from a log, beside those from shards

See jobs/bench/stream.sh.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from launch import HVDLLM, records
from redis_server import Server

from hvdllm.bench.paired import ratio
from hvdllm.interpreter import PYTHON, found
from hvdllm.online import reader
from hvdllm.online.log import Log
from hvdllm.text import corpus
from hvdllm.text.parts import Stdlib, Stream
from hvdllm.text.tokenize import BYTES, Tokenizer, train_bpe

KILOBYTE = 1000


def texts(count: int) -> list[str]:
    """Documents of 1 kB, pages of the standard library's source, over again where that is too short."""
    pages = []
    for each in corpus.documents(Stdlib()):
        pages += [each.text[at : at + KILOBYTE] for at in range(0, len(each.text) - KILOBYTE, KILOBYTE)]
        if len(pages) >= count:
            return pages[:count]
    return (pages * (count // len(pages) + 1))[:count]


def intake(count: int) -> dict[str, tuple[float, float]]:
    """Documents a second, and a second of the reader's CPU time, for each tokenizer. The reader has one core, and the
    server the others."""
    pages, out = texts(count), {}
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[1:] or cores))
        server = Server(tmp)
        try:
            with server.client.pipeline(transaction=False) as many:
                for number, page in enumerate(pages):
                    many.xadd("documents", {"text": page})
                    if number % 1000 == 999:
                        many.execute()
                many.execute()
            for kind, tokenizer in (
                ("bytes", Tokenizer(BYTES)),
                ("bpe, 2,048 tokens", train_bpe(iter(pages[:2000]), 2048)),
            ):
                folder = tmp / kind.partition(",")[0]
                folder.mkdir()
                tokenizer.save(folder / "tokenizer.json")
                settings = Stream(source="redis", address=server.address)
                read, write = os.pipe()
                process = subprocess.Popen(
                    [*PYTHON, "hvdllm.online.reader", str(read)], pass_fds=(read,), stdout=subprocess.DEVNULL,
                    env={**os.environ, **found()},
                )  # fmt: skip
                os.sched_setaffinity(process.pid, {cores[0]})
                os.write(write, reader.task(settings, folder, folder / "tokenizer.json", 0, 1))
                log = Log(folder, np.dtype(tokenizer.dtype))
                first: tuple[int, float, float] | None = None
                while log.last.documents < count:
                    log.refresh()
                    if first is None and log.last.documents:
                        first = log.last.documents, time.perf_counter(), cpu_s(process.pid)
                    time.sleep(0.002)
                assert first is not None
                read_since, begun, used = first
                seconds = (time.perf_counter() - begun, cpu_s(process.pid) - used)
                out[kind] = ((count - read_since) / seconds[0], (count - read_since) / seconds[1])
                os.close(read)
                os.close(write)
                process.wait()
        finally:
            server.close()
            os.sched_setaffinity(0, set(cores))
    return out


def cpu_s(pid: int) -> float:
    """Seconds of CPU time of a process with its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(pairs: int) -> tuple[list[float], list[float]]:
    """Tokens a second from shards and from a log of the same documents, in turns: medians of all commits but the
    first."""
    both: dict[str, list[float]] = {"files": [], "log": []}
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        (tmp / "text").mkdir()
        with (tmp / "text" / "a.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": page}) + "\n" for page in texts(2000))
        common = [
            "text.tokenizer=bytes", "model=tiny", "batch_tokens=8192", "log_every=8192", "budget_tokens=163840",
            "eval_every=0", "save_every=0", "sample_every=0", f"runs_dir={tmp}/runs", f"data_dir={tmp}/data",
        ]  # fmt: skip
        play = ["text=stream", f"text.path={tmp}/text", "text.rate=0", "name=read", *common]
        subprocess.run([*HVDLLM, "train", *play], check=True, stdout=subprocess.DEVNULL)
        kinds = {
            "files": ["text=files", f"text.path={tmp}/text"],
            "log": ["text=stream", "text.source=log", f"text.path={tmp}/runs/read/log"],
        }
        for number in range(pairs):
            for kind in kinds if number % 2 else reversed(list(kinds)):
                words = [*HVDLLM, "train", *kinds[kind], *common, f"name={kind}{number}"]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                speeds = [each["tokens_per_s"] for each in records(tmp / "runs" / f"{kind}{number}", "commit")]
                both[kind].append(statistics.median(speeds[1:]))
    return both["files"], both["log"]


def main(argv: list[str]) -> int:
    what, count = argv[0], int(argv[1]) if len(argv) > 1 else 0
    if what == "intake":
        for kind, (rate, of_cpu) in intake(count or 100_000).items():
            print(f"{kind:20} {rate:>9,.0f} documents of 1 kB a second, {of_cpu:,.0f} a second of CPU time")
        return 0
    files, log = train(count or 6)
    for kind, speeds in (("shards", files), ("log", log)):
        print(f"{kind:20} {statistics.median(speeds):>9,.0f} tokens a second")
    seen = ratio([a / b for a, b in zip(log, files, strict=True)])
    print(f"log / shards: {seen.median:.3f}, 95% interval {seen.low:.3f} to {seen.high:.3f} ({seen.pairs} pairs)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
