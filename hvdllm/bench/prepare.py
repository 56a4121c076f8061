"""How fast a text is prepared, beside the speed at which `tokenizers` alone encodes it.

The text is made of the standard library's source: documents of .txt and .jsonl files, each of which differs. Each
measurement runs in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from hvdllm.bench.paired import ratio
from hvdllm.device import usable_cores
from hvdllm.errors import RunError
from hvdllm.interpreter import PYTHON
from hvdllm.plain import Json
from hvdllm.text import shards
from hvdllm.text.corpus import read, rule, sources, stdlib
from hvdllm.text.parts import Files, Stdlib
from hvdllm.text.tokenize import Tokenizer

PAIRS = 6  # shares of the text, each of which is encoded in both ways
FILE = 4_000_000  # bytes of a file of the text
BATCH = 8_000_000  # characters that `tokenizers` gets at a time
SAMPLED_S = 0.1  # seconds between two looks at the memory


def measure(megabytes: int, vocab: int = 2048) -> Json:
    """Prepares a text of this size as a whole, and then its shares in interleaved pairs.

    Raises RunError if a measurement fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder / "text", megabytes * 1_000_000)
        whole = _run("whole", folder / "text", folder, vocab)
        ours: list[float] = []
        theirs: list[float] = []
        for share in sorted((folder / "text").iterdir()):
            both = {}
            for what in ("ours", "theirs") if len(ours) % 2 == 0 else ("theirs", "ours"):
                both[what] = _run(what, share, folder, vocab)
            ours.append(both["ours"]["bytes"] / both["ours"]["encode_s"])
            theirs.append(both["theirs"]["bytes"] / both["theirs"]["encode_s"])
    return {
        "megabytes": size / 1e6,
        "cores": usable_cores(),
        "train_mb_per_s": whole["bytes"] / whole["train_s"] / 1e6,
        "encode_mb_per_s": whole["bytes"] / whole["encode_s"] / 1e6,
        "peak_mib": whole["peak_mib"],
        "shares_mb_per_s": {"ours": [each / 1e6 for each in ours], "tokenizers": [each / 1e6 for each in theirs]},
        "ratio": asdict(ratio([a / b for a, b in zip(ours, theirs, strict=True)])),
    }


def write(folder: Path, size: int, seed: int = 0) -> int:
    """Writes PAIRS folders of text of about `size` bytes in all. Returns how many bytes of files there are."""
    draw = random.Random(seed)
    texts = [path.read_text(errors="replace") for path in stdlib(Stdlib())]
    lined = [text.splitlines(keepends=True) for text in texts if text]
    written = 0
    for share in range(PAIRS):
        (folder / str(share)).mkdir(parents=True)
        number, until = 0, (share + 1) * size // PAIRS
        while written < until:
            lines = number % 2 == 1
            room = min(FILE, until - written)
            documents = []
            while room > 0:
                source = draw.choice(lined)
                first = draw.randrange(len(source))
                text = f"# {draw.random()}\n" + "".join(source[first : first + draw.randrange(20, 400)])
                documents.append(json.dumps({"text": text}) + "\n" if lines else text)
                room -= len(documents[-1])
            path = folder / str(share) / f"{number:05}.{'jsonl' if lines else 'txt'}"
            path.write_text("".join(documents), encoding="utf-8")
            written, number = written + path.stat().st_size, number + 1
    return written


def _run(what: str, text: Path, folder: Path, vocab: int) -> Json:
    """Runs one measurement in a process. Returns its figures, and the most memory that it and its own held together."""
    command = [*PYTHON, __name__, what, str(text), str(folder), str(vocab)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    try:
        while True:
            peak = max(peak, _resident(process.pid))
            try:
                out, _ = process.communicate(timeout=SAMPLED_S)
                break
            except subprocess.TimeoutExpired:
                pass
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise RunError(f"`{' '.join(command)}` failed with exit code {process.returncode}: its lines above say why")
    figures: Json = json.loads(out)
    return figures | {"peak_mib": peak / 2**20}


def _resident(pid: int) -> int:
    """Bytes in memory of a process and its children; 0 where the system does not say it."""
    pages = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *children):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    except (OSError, IndexError):  # one of them has ended meanwhile
        return 0
    return pages * 4096


def _measured(what: str, path: Path, folder: Path, vocab: int) -> Json:
    """One measurement, in this process."""
    text = Files(path=str(path), vocab=vocab)
    kept = folder / "tokenizer.json"
    size = sum(file.stat().st_size for file in path.rglob("*.*"))
    figures: Json = {"bytes": size}

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    began = time.perf_counter()
    if what == "whole":
        shards.learnt(text, say).save(kept)
        figures["train_s"] = time.perf_counter() - began
    if what == "theirs":
        figures["encode_s"] = _alone(text, Tokenizer.load(kept))
    else:
        text.tokenizer = str(kept)
        began = time.perf_counter()
        shards.prepare(text, folder / what / path.name, say=say)
        figures["encode_s"] = time.perf_counter() - began
    return figures


def _alone(text: Files, tokenizer: Tokenizer) -> float:
    """The seconds in which `tokenizers` encodes the pieces of a text, which are read and cut beforehand."""
    seconds, sides = 0.0, rule(text)
    batch: list[str] = []
    size = 0

    def encode() -> float:
        began = time.perf_counter()
        tokenizer.encode_only(batch)
        return time.perf_counter() - began

    for _, _, piece in (each for raw in read(sources(text)[0]) for each in sides.pieces(raw)):
        batch.append(piece)
        size += len(piece)
        if size >= BATCH:
            seconds += encode()
            batch, size = [], 0
    return seconds + encode()


if __name__ == "__main__":
    print(json.dumps(_measured(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
