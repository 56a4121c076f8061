"""Run folders whose answers are known by hand: losses, seconds and bytes are what the test says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hvdllm import sums

CONFIG: dict[str, Any] = {
    "name": "x", "runs_dir": "runs", "data_dir": None, "seed": 0, "budget_tokens": 400, "eval_every": 100,
    "save_every": 100, "log_every": 100, "batch_tokens": 10, "precision": "fp32",
    "text": {"name": "files", "path": "a.txt"},
    "model": {"name": "gpt", "layers": 2},
    "exchange": {"name": "allreduce", "bucket_mb": None},
    "wire": {"name": "fp32", "hierarchical": False},
    "world": {"name": "world", "kind": "auto", "size": 4},
    "optim": {"name": "adamw", "lr": 0.003},
}  # fmt: skip
FOUND: dict[str, Any] = {
    "world": 2, "threads": 1, "data_hash": "d1", "tokenizer_hash": "t1", "parameters": 1000,
    "ranks": [{"host": "a", "device": "CPU", "kind": "cpu"}, {"host": "b", "device": "CPU", "kind": "cpu"}],
    "versions": {"python": "3.11", "torch": "2.13"}, "git": {"commit": "abc", "dirty": False},
}  # fmt: skip
LOSSES = (8.0, 6.0, 5.0, 4.0)


def settings(exchange: str = "allreduce", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """changes: `optim__lr=0.1` for optim.lr."""
    out = copy.deepcopy(CONFIG)
    out["exchange"]["name"], out["seed"] = exchange, seed
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (out[group] if group else out)[name] = value
    return out


def records(
    config: dict[str, Any], losses: tuple[float, ...] = LOSSES, *, step_s: float = 1.0, sent: float = 1000.0,
    act_s: float = 0.5, every: int = 100, reason: str | None = "budget", found: dict[str, Any] | None = None,
    compute: float = 0.6, blocked: float = 0.3, flight: float = 0.5,
) -> list[dict[str, Any]]:  # fmt: skip
    """An evaluation and a commit record every `every` tokens, of 10 updates and step_s seconds each."""
    out: list[dict[str, Any]] = [{"kind": "run", "config": config, **FOUND, **(found or {})}]
    for k, loss in enumerate(losses, 1):
        seconds = 10 * step_s * k
        commit = {
            "kind": "commit", "step": 10 * k, "tokens": every * k, "seconds": seconds, "loss": loss,
            "compute_s": 10 * step_s * compute, "blocked_s": 10 * step_s * blocked, "flight_s": 10 * step_s * flight,
            "skew_s": step_s, "cpu_s_per_token": 2e-4, "bytes_sent": sent, "staleness_mean": 1.0, "staleness_max": 2.0,
            "micro_batches_by_rank": [10.0, 30.0], "updates": 10,
        }  # fmt: skip
        out.append(commit)
        out.append(
            {"kind": "eval", "tokens": every * k, "seconds": seconds, "loss": loss, "wall_s": seconds + act_s * k}
        )
    if reason is not None:
        tokens = every * len(losses)
        out.append({"kind": "end", "reason": reason, "tokens": tokens, "tokens_computed": tokens + 4})
    return out


def write(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text, last = "", ""
    for line in lines:
        sealed, last = sums.sealed(json.dumps({key: value for key, value in line.items() if key != "sum"}), last)
        text += sealed + "\n"
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def make(
    folder: Path, exchange: str = "allreduce", seed: int = 0, losses: tuple[float, ...] = LOSSES, **more: Any
) -> Path:  # fmt: skip
    """more: what `records` takes; anything else is a setting."""
    takes = ("step_s", "sent", "act_s", "every", "reason", "found", "compute", "blocked", "flight")
    own = {key: more.pop(key) for key in takes if key in more}
    return write(folder, records(settings(exchange, seed, **more), losses, **own))
