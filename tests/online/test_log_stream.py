"""Training on a log: the same rounds for any number of ranks and exchange, each window once, exactly resumed."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvdllm import registry, runs
from hvdllm.cli.main import main
from hvdllm.online import rounds
from hvdllm.online.decider import Decider
from hvdllm.online.log import Log, Writer
from hvdllm.online.rounds import Layout, Plan, Rounds
from hvdllm.online.stream import LogStream
from hvdllm.online.waiting import Pauses, Waiting
from hvdllm.online.windows import LogItems
from hvdllm.text.tokenize import BYTES, Tokenizer
from hvdllm.world.base import Asks

SHORT = {
    "local_sgd": ("exchange.local_steps=2",), "diloco": ("exchange.local_steps=2",),
    "streaming_diloco": ("exchange.local_steps=4", "exchange.fragments=2"),
}  # fmt: skip
EXCHANGES = [
    name
    for name, part in registry.parts("exchange").items()
    if part.facts.carries not in registry.LIBRARIES and not part.facts.clients
]
EXACT = ("allreduce", "sharded")


def documents(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [f"{number} the quick brown fox {draw.integers(1000)} jumps over it" for number in range(count)]


def append(folder: Path, texts: list[str]) -> None:
    """Writes a log that is whole."""
    tokenizer = Tokenizer(BYTES)
    writer = Writer(Path(f"{folder}-whole"), np.dtype(np.uint16))
    for text in texts:
        ids = np.append(tokenizer.encode([text])[0], tokenizer.end)
        writer.append([ids], 1, len(text.encode()), {"document": writer.last.documents + 1})
    writer.close()


def arrive(folder: Path, texts: list[str]) -> None:
    """Adds documents to a folder that a run reads."""
    source = Path(f"{folder}-in")
    source.mkdir(exist_ok=True)
    with (source / "a.jsonl").open("a") as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def trained(tmp_path: Path, *more: str, name: str = "a", code: int = 0) -> list[dict[str, Any]]:
    source = ("folder", tmp_path / f"{name}-in")
    if not source[1].exists():
        source = ("log", tmp_path / f"{name}-whole")
    words = [
        "train", "text=stream", f"text.source={source[0]}", f"text.path={source[1]}",
        "text.tokenizer=bytes", "text.slice_tokens=1024", "model.layers=1", "model.width=16",
        "model.heads=2", "model.context=16", "batch_tokens=192", "budget_tokens=1920", f"name={name}",
        f"runs_dir={tmp_path}", f"data_dir={tmp_path / 'data'}", "device=cpu", "device.threads=1", "log_every=192",
        "eval_every=960", "save_every=960", "sample_every=0", "precision=fp64", "schedule=constant",
        "schedule.warmup=0", "text.wait_s=0.2", "audit_every=960", *more,
    ]  # fmt: skip
    assert main(words) == code
    return list(runs.records(tmp_path / name))


def losses(records: list[dict[str, Any]], key: str = "loss") -> list[float]:
    return [record[key] for record in records if record["kind"] == "commit"]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        append(tmp_path / name, documents(120))
    return tmp_path


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_exchange_trains_on_a_stream(filled: Path, exchange: str) -> None:
    size = 3 if exchange == "parameter_server" else 2
    records = trained(filled, f"exchange={exchange}", "world=virtual", f"world.size={size}", *SHORT.get(exchange, ()))
    found = losses(records)
    assert len(found) >= 4 and found[-1] < found[0]
    (end,) = [record for record in records if record["kind"] == "end"]
    assert end["reason"] == "budget"
    before = losses(records, "prequential")
    assert before[-1] < before[0]


def test_any_number_of_ranks_trains_on_the_same_rounds(filled: Path) -> None:
    one = trained(filled)
    three = trained(filled, "world=virtual", "world.size=3", name="b")
    for key in ("loss", "prequential", "prequential_recent", "prequential_whole_bits_per_byte"):
        assert losses(three, key) == pytest.approx(losses(one, key), rel=1e-9)
    assert losses(one, "prequential") == pytest.approx(losses(one), rel=1e-12)  # without replay all text is fresh


@pytest.mark.parametrize("exchange", ["allreduce", "delayed", "acco", "local_sgd", "parameter_server"])
def test_a_resumed_run_goes_on_exactly(filled: Path, exchange: str) -> None:
    more = [f"exchange={exchange}", "world=virtual", "world.size=2", *SHORT.get(exchange, ()), "text.replay=0.25"]
    more += ["exchange.staleness=0"] * (exchange == "parameter_server")
    whole = trained(filled, *more)
    trained(filled, *more, "budget_tokens=960", name="b")
    again = trained(filled, *more, name="b")
    for key in ("loss", "prequential", "prequential_recent", "tokens"):
        assert losses(again, key) == losses(whole, key)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Path]:
    """A folder to which a thread adds a document now and then."""
    arrive(tmp_path / "a", [])
    done = threading.Event()

    def write() -> None:
        for text in documents(120):
            arrive(tmp_path / "a", [text])
            if done.wait(0.02):
                return

    thread = threading.Thread(target=write)
    thread.start()
    yield tmp_path
    done.set()
    thread.join()


@pytest.mark.parametrize("exchange", ["allreduce", "acco", "local_sgd", "parameter_server"])
def test_rounds_wait_for_text_and_are_made_of_what_there_is(slow: Path, exchange: str) -> None:
    size = 3 if exchange == "parameter_server" else 2
    more = ["exchange=" + exchange, "world=virtual", f"world.size={size}", *SHORT.get(exchange, ())]
    records = trained(slow, *more, "text.wait_s=0.05", "budget_tokens=960")
    (end,) = [record for record in records if record["kind"] == "end"]
    assert end["reason"] == "budget" and end["data_waited_s"] > 0


@pytest.mark.parametrize("exchange", ["allreduce", "delayed", "acco", "local_sgd", "diloco", "parameter_server"])
def test_a_run_that_waits_can_be_stopped_and_goes_on_exactly(tmp_path: Path, exchange: str) -> None:
    """Seen to catch: a stop that saves at another round on each rank, a wait that hears no signal."""
    size = 3 if exchange == "parameter_server" else 2
    more = ["exchange=" + exchange, "world=virtual", f"world.size={size}", *SHORT.get(exchange, ())]
    more += ["exchange.staleness=0"] * (exchange == "parameter_server") + ["text.wait_s=600", "eval_every=0"]
    arrive(tmp_path / "a", documents(120))
    whole = trained(tmp_path, *more)
    arrive(tmp_path / "b", documents(24))

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        rounds = tmp_path / "b" / "log" / "rounds.bin"
        while (not rounds.exists() or rounds.stat().st_size < 4 * 44) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    first = trained(tmp_path, *more, name="b", code=75)
    thread.join()
    assert [record["reason"] for record in first if record["kind"] == "end"] == ["stop"]
    arrive(tmp_path / "b", documents(120)[24:])
    again = trained(tmp_path, *more, name="b")
    for key in ("tokens", "loss", "prequential", "prequential_recent"):
        assert losses(again, key) == losses(whole, key)


def test_a_disk_that_takes_no_round_ends_the_run_in_a_sentence(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rounds.os, "pwrite", full)
    trained(filled, code=1)
    said = capsys.readouterr().err
    assert "rounds.bin cannot be written (No space left on device): make room" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "begins", "sentence"),
    [
        ("index.jsonl", b"\x00\xff no index", "it is no log of this version"),
        ("index.jsonl", b'{"tokens": 1e400, "documents": "many"}\n', "it is no log of this version"),
        ("index.jsonl", b"[" * 100_000 + b"\n", "it is no log of this version"),
        ("tokens-000000.bin", b"\xff" * 20_000, "holds tokens that its tokenizer has not"),
    ],
)
def test_the_log_of_a_stranger_is_a_sentence(
    filled: Path, capsys: pytest.CaptureFixture[str], name: str, begins: bytes, sentence: str
) -> None:
    path = filled / "a-whole" / name
    path.write_bytes(
        begins + path.read_bytes()[len(begins) :] if name.startswith("tokens") else begins + path.read_bytes()
    )
    trained(filled, code=2)
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_a_log_that_was_cut_is_a_sentence(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(filled, "budget_tokens=960")
    os.truncate(filled / "a-whole" / "tokens-000000.bin", 1000)
    trained(filled, code=2)
    assert "has 500 tokens, and its index tells of" in capsys.readouterr().err
    (filled / "a" / "log" / "rounds.bin").write_bytes(b"")
    trained(filled, code=2)
    assert "has no round 4, which was trained on: copy the log again" in capsys.readouterr().err


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_have_as_many_windows_with_those_of_the_past(size: int, tmp_path: Path) -> None:
    """Seen to catch: the first ranks, which have one fresh window more, get what is left over of the past as well."""
    append(tmp_path / "a", documents(120))
    log = Log(Path(f"{tmp_path / 'a'}-whole"), np.dtype(np.uint16))
    log.refresh()
    items, layout = LogItems(log, 16, np.ones(257, np.int64)), Layout(16, 64, 4)
    seen: list[list[int]] = []
    for rank in range(size):
        plan = Plan(16, size, replay=0.45)
        decider = Decider(items, Rounds(tmp_path), layout, plan, rank=0, wait_s=1.0, still=True)
        waiting = Waiting(Asks(), Pauses(tmp_path, "life", rank), rank, size, time.sleep)
        stream = LogStream(
            decider, waiting, micro_batch=16, seed=0, rank=rank, size=size, device=torch.device("cpu")
        )  # fmt: skip
        try:
            assert decider.decided(0) and decider.decided(1) and decider.decided(2)
            seen.append([sum(batch.tokens for batch in stream.share(number)) // 16 for number in range(3)])
        finally:
            stream.close()
    for counts in zip(*seen, strict=True):
        assert sum(counts) in (9, 16) and max(counts) - min(counts) <= 1
