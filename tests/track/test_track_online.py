"""track.mode=online against a small fake of W&B's server: what arrives, and an outage while the run trains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from fake_wandb import FakeWandb
from launch import BATCH, HVDLLM, Job, launch, meddled, records, words_of

pytestmark = pytest.mark.skipif(not wandb.__version__.startswith("0.31"), reason="the fake speaks as wandb 0.31 does")

ONLINE = ["track=wandb", "track.mode=online", "track.start_s=30"]


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with FakeWandb() as one:
        yield one


def env(tmp: Path, server: FakeWandb) -> dict[str, str]:
    (tmp / "home").mkdir(exist_ok=True)
    often = {"WANDB_X_STATS_SAMPLING_INTERVAL": "0.2", "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}
    key = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
    return {"HOME": str(tmp / "home"), **key, **often}


def name(run: Path) -> str:
    return str(json.loads((run / "track.json").read_text())["wandb"]["id"])


def arrived(server: FakeWandb, run: Path) -> dict[int, float]:
    """Of each training record, by tokens, the loss."""
    return {r["tokens"]: r["train/loss"] for r in server.history(name(run)) if "train/loss" in r}


def test_all_records_arrive(tmp_path: Path, server: FakeWandb) -> None:
    run = tmp_path / "runs" / "a"
    words = words_of(tmp_path, "a", 6, *ONLINE, f"eval_every={2 * BATCH}")
    done = launch([*HVDLLM, "train", *words], **env(tmp_path, server))
    assert f"W&B: {server.url}/" in done.out and "offline" not in done.out
    assert arrived(server, run) == {r["tokens"]: r["loss"] for r in records(run, "commit")}
    evals = [r for r in server.history(name(run)) if "eval/loss" in r]
    for got, kept in zip(evals, records(run, "eval"), strict=True):  # a curve over bytes needs both in one row
        assert all(got[f"eval/{key}"] == kept[key] for key in ("loss", "bytes_total", "blocked_s_total", "seconds"))
    assert server.exits == {name(run): 0} and '"budget_tokens"' in server.configs[name(run)]


def outage(tmp: Path, server: FakeWandb, job: Job) -> Path:
    """The server goes away while the run trains, before it has got a record: W&B's client sends every 15 seconds."""
    run = tmp / "runs" / "a"
    job.until(lambda: bool(server.configs) and len(records(run, "commit")) > 2)
    server.down = True
    return run


def test_an_outage_in_mid_run_loses_nothing(tmp_path: Path, server: FakeWandb) -> None:
    with Job(meddled(words_of(tmp_path, "a", 60, *ONLINE), slow_s=0.1), **env(tmp_path, server)) as job:
        run = outage(tmp_path, server, job)
        job.until(lambda: server.refused > 0)
        server.down = False
        assert job.wait().code == 0
    assert arrived(server, run) == {r["tokens"]: r["loss"] for r in records(run, "commit")}
    assert "wandb-events.jsonl" in server.names(name(run)), "the system's statistics"


def test_an_outage_that_does_not_end_neither_stops_nor_holds_the_run(tmp_path: Path, server: FakeWandb) -> None:
    with Job(meddled(words_of(tmp_path, "a", 40, *ONLINE), slow_s=0.1), **env(tmp_path, server)) as job:
        run = outage(tmp_path, server, job)
        done = job.wait()
        job.until_gone()
    assert done.code == 0 and records(run, "end")[-1]["reason"] == "budget" and len(records(run, "commit")) == 40
    assert "did not take all of this run within 10 s: `hvdllm track sync" in done.out
