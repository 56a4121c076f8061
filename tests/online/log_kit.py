"""A log that is filled, and runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hvdllm import runs
from hvdllm.cli.main import main
from hvdllm.online.log import Writer
from hvdllm.text.tokenize import BYTES, Tokenizer

MODEL = ("model.layers=1", "model.width=16", "model.heads=2", "model.context=16", "precision=fp64", "device=cpu")
SHORT = {"local_sgd": ("exchange.local_steps=2",), "diloco": ("exchange.local_steps=2",)}


def fill(folder: Path, count: int, seed: int = 0, after: str = "") -> None:
    """Appends documents to the log in a folder. after: what stands in those of the second half."""
    tokenizer, draw = Tokenizer(BYTES), np.random.default_rng(seed)
    writer = Writer(folder, np.dtype(np.uint16))
    for number in range(count):
        other = after if number >= count // 2 else ""
        text = other or f"{number} the quick brown fox {draw.integers(1000)} jumps over it"
        ids = np.append(tokenizer.encode([text])[0], tokenizer.end)
        writer.append([ids], 1, len(text.encode()), {"document": writer.last.documents + 1})
    writer.close()


def trained(tmp_path: Path, *more: str, name: str = "a", code: int = 0) -> list[dict[str, Any]]:
    """Trains a small model on the log in tmp_path/log, and returns the records."""
    words = [
        "train", "text=stream", "text.source=log", f"text.path={tmp_path / 'log'}", "text.tokenizer=bytes",
        "text.slice_tokens=1024", *MODEL, "batch_tokens=192", "budget_tokens=1920", f"name={name}",
        f"runs_dir={tmp_path}", f"data_dir={tmp_path / 'data'}", "device.threads=1", "log_every=192", "eval_every=960",
        "save_every=960", "sample_every=0", "schedule=infinite", "schedule.warmup_tokens=400",
        "schedule.settle_tokens=400", "text.wait_s=0.2", "audit_every=960", *more,
    ]  # fmt: skip
    assert main(words) == code
    return list(runs.records(tmp_path / name))


def values(records: list[dict[str, Any]], key: str = "loss", kind: str = "commit") -> list[Any]:
    return [record[key] for record in records if record["kind"] == kind]
